"""Turn text into token shards, the form in which training reads it.

    python tools/prepare_data.py corpus/*.jsonl --output shards --tokenizer-name bytes --workers 8

INPUT is a txt, jsonl (both also .gz, .zst) or parquet file, a folder, a glob, an fsspec URL, or
hf:NAME for a dataset of the Hugging Face hub. Killed and started again, the tool keeps what is
finished. Exit codes: 0 done, 2 an error in the inputs or settings, 130 interrupted.
"""

import time
from collections.abc import Sequence

from titan_smf.commands.entry import add_options, make_parser
from titan_smf.data.prepare import prepare, train_tokenizer
from titan_smf.data.prepare_part import PrepareOptions
from titan_smf.data.raw_text import TextOptions
from titan_smf.data.tokenizer import load_tokenizer

# option, default, what it is
OPTIONS: list[tuple[str, str | int | float, str]] = [
    ("--tokenizer-name", "", "bytes, or a tiktoken encoding such as o200k_base"),
    ("--tokenizer-path", "", "a tiktoken rank file"),
    ("--tokenizer-pattern", "", "for a rank file: default, llama3, cl100k, gpt2 or a regex"),
    ("--train-tokenizer", 0, "train OUTPUT/tokenizer.tiktoken with this vocabulary size instead"),
    ("--field", "text", "jsonl field or column that holds the text"),
    ("--split-text", "blank-lines", "txt: documents end at blank-lines, or none: a file is one"),
    ("--hf-config", "", "configuration of the hub datasets"),
    ("--hf-split", "train", "split of the hub datasets"),
    ("--validation-fraction", 0.0, "share of the documents written to OUTPUT/validation instead"),
    ("--on-bad-line", "raise", "a line or row that is no document: raise, or skip and count it"),
    ("--max-bad-lines", 100, "with skip: stop all the same beyond this many"),
    ("--workers", 1, "processes"),
    ("--part-megabytes", 64, "input a worker takes at a time; roughly a shard"),
]


def main(argv: Sequence[str]) -> None:
    """Write the shards, and train a tokenizer before if asked to."""
    parser = make_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--output", required=True, help="folder or URL for the token shards")
    add_options(parser, OPTIONS)
    args = parser.parse_args(argv)
    options = PrepareOptions(
        TextOptions(args.field, args.split_text, args.hf_config, args.hf_split),
        validation_fraction=args.validation_fraction,
        part_bytes=args.part_megabytes << 20,
        on_bad_line=args.on_bad_line,
        max_bad_lines=args.max_bad_lines,
    )
    start = time.monotonic()
    if args.train_tokenizer:
        tokenizer = train_tokenizer(args.inputs, args.output, args.train_tokenizer, options)
    else:
        tokenizer = load_tokenizer(args.tokenizer_name, args.tokenizer_path, args.tokenizer_pattern)
    counts = prepare(args.inputs, args.output, tokenizer, options, args.workers, report=print)
    print(f"{args.output}: {counts.summary()}, in {time.monotonic() - start:.1f} s")
