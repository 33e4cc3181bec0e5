"""Make what a model is to learn: a fact stream, a document stream, or text that states facts.

    tools/make_stream.py facts QUESTIONS --output new.jsonl --part 1/2
    tools/make_stream.py documents TEXT ... --output chunks.jsonl
    tools/make_stream.py text known.jsonl --output pretraining.jsonl

QUESTIONS is a jsonl, csv or parquet file with the fields of NQ-open, TriviaQA, SimpleQA or a fact
stream, a URL of one, hf:NAME?config=C&split=S, or synthetic:world?set=new_facts. TEXT is what
tools/prepare_data.py takes. FACTS is a fact stream; its text is for pretraining.

Statements and rewrites come from simple patterns, which quote the question or reorder sentences;
from a field of the input (--from-field); or from a chat endpoint (--endpoint), after its cost was
shown and agreed to. Its answers are kept: a run that was killed and is started again pays for none
twice. Exit codes: 0 done, 2 a mistake, 130 interrupted.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from titan_smf.commands.entry import add_options, make_parser
from titan_smf.data.raw_text import TextOptions
from titan_smf.errors import ConfigError
from titan_smf.streams.endpoint import EndpointOptions
from titan_smf.streams.making import (
    StreamOptions,
    Subset,
    check_output,
    make_documents,
    make_facts,
    text_of_facts,
    write_lines,
)
from titan_smf.streams.records import Fact, Record, read_records

INPUTS = {"facts": "QUESTIONS", "documents": "TEXT", "text": "FACTS"}
STREAMS = "facts documents"

# commands, option, default, what it is
OPTIONS: list[tuple[str, str, str | int | float | bool, str]] = [
    ("facts documents text", "--overwrite", False, "replace an output that exists"),
    ("facts documents text", "--seed", 0, "of what is drawn"),
    (STREAMS, "--part", "", "i/n: the i-th of n parts that share no question or chunk, as 1/2"),
    (STREAMS, "--skip", 0, "records of the part that are left out first"),
    (STREAMS, "--limit", 0, "records at most, else all"),
    ("facts", "--statements", 64, "statements of a fact"),
    ("documents", "--rewrites", 64, "rewrites of a chunk"),
    ("documents", "--chunk-words", 100, "words of a chunk, about: it ends where a sentence does"),
    ("documents", "--field", "text", "jsonl field or column that holds the text"),
    ("documents", "--split-text", "blank-lines", "txt: documents end at blank-lines, or none"),
    ("documents", "--hf-config", "", "configuration of the hub datasets"),
    ("documents", "--hf-split", "train", "split of the hub datasets"),
    ("text", "--statements", 8, "times that a fact is stated, and asked if it is asked at all"),
    ("text", "--asked-share", 0.8, "share of the facts that are asked too"),
    (STREAMS, "--from-field", "", "field of the input that has the statements or rewrites"),
    (STREAMS, "--endpoint", "", "URL of an OpenAI-compatible API, up to /v1"),
    (STREAMS, "--model", "", "its model"),
    (STREAMS, "--key-variable", "OPENAI_API_KEY", "environment variable that holds its key"),
    (STREAMS, "--prompts", "", "TOML file of prompts, in place of titan_smf/streams/prompts.toml"),
    (STREAMS, "--cache", "", "folder of the kept answers, else one in ~/.cache/titan_smf"),
    (STREAMS, "--concurrency", 8, "records that are asked for at once"),
    (STREAMS, "--price-in", 0.0, "price of a million tokens in, for the cost"),
    (STREAMS, "--price-out", 0.0, "price of a million tokens out"),
    (STREAMS, "--yes", False, "agree to the cost beforehand"),
]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command and its options."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, metavar in INPUTS.items():
        command = commands.add_parser(
            name, description=__doc__, formatter_class=parser.formatter_class
        )
        command.add_argument("inputs", nargs="+" if name == "documents" else 1, metavar=metavar)
        command.add_argument("--output", required=True, help="path or URL that ends in .jsonl")
        add_options(command, [row[1:] for row in OPTIONS if name in row[0].split()])
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Make and write what the arguments say.

    Raises:
        UserError: a mistake in the input or the settings, or an endpoint that does not answer.
    """
    args = parse_arguments(argv)
    check_output(args.output, args.overwrite)
    report = functools.partial(print, flush=True)  # at once, also where the output is a file
    records: Sequence[Any]
    if args.command == "text":
        facts = read_records(args.inputs[0], Fact)
        records = text_of_facts(facts, args.statements, args.asked_share, args.seed)
        made = f"{len(records):,} texts of {len(facts):,} facts"
    elif args.command == "facts":
        records = make_facts(args.inputs[0], _options(args), report)
        made = f"{len(records):,} facts, {_num_texts(records):,} statements"
    else:
        records = make_documents(args.inputs, _options(args), report)
        made = f"{len(records):,} chunks, {_num_texts(records):,} rewrites"
    print(f"{args.output}: {made}, {write_lines(args.output, records):,} bytes")


def _num_texts(records: Sequence[Record]) -> int:
    return sum(len(record.texts) for record in records)


def _options(args: argparse.Namespace) -> StreamOptions:
    endpoint = None
    if args.endpoint:
        endpoint = EndpointOptions(
            args.endpoint,
            args.model,
            args.key_variable,
            args.prompts,
            args.cache,
            args.concurrency,
            args.price_in,
            args.price_out,
            args.yes,
        )
    elif args.model or args.prompts:
        raise ConfigError("--endpoint", "", "a URL, since a model or prompts are given")
    subset = Subset(args.part, args.skip, args.limit)
    if args.command == "facts":
        return StreamOptions(args.statements, args.seed, args.from_field, endpoint, subset)
    text = TextOptions(args.field, args.split_text, args.hf_config, args.hf_split)
    return StreamOptions(
        args.rewrites, args.seed, args.from_field, endpoint, subset, text, args.chunk_words
    )
