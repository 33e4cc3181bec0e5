"""Write a small invented world: its text, new facts to learn, and questions about known ones.

    python tools/make_world.py outputs/world --facts 2000 --new-facts 500

    train.jsonl validation.jsonl        text that states the known facts, a document a line
    new_facts.jsonl documents.jsonl     streams of facts and of documents that the text never states
    tuning_facts.jsonl                  a stream of other new facts, to choose settings on
    known_facts.jsonl                   known facts that the text asks, in random order; statements
                                        in wordings that it does not use
    near_facts.jsonl far_facts.jsonl    those most and least like the new facts
    other_facts.jsonl                   those that are neither

The same settings give the same bytes everywhere. Exit codes: 0 done, 2 settings that cannot be
used.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from titan_smf import storage
from titan_smf.commands.entry import add_options, make_parser
from titan_smf.errors import ConfigError
from titan_smf.streams.records import document_stream, fact_stream
from titan_smf.world.world import FACT_SETS, STREAM_STATEMENTS, World

# option, default, what it is
OPTIONS = [
    ("--seed", 0, "chooses names, facts and wording"),
    ("--facts", 2000, "facts that the text states"),
    ("--new-facts", 500, "facts of the streams"),
    ("--tuning-facts", 0, "facts to choose settings on"),
    ("--statements", STREAM_STATEMENTS, "statements of a fact and rewrites of a chunk in streams"),
]


def main(argv: Sequence[str]) -> None:
    """Write all files of a world and print how large they are."""
    parser = make_parser(__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the files")
    add_options(parser, OPTIONS)
    args = parser.parse_args(argv)
    count = args.statements
    if count < 1:
        raise ConfigError("--statements", count, "1 or more")
    world = World(args.seed, args.facts, args.new_facts, args.tuning_facts)
    files: dict[str, tuple[str, Iterable[Any]]] = {
        split: ("documents", ({"text": text} for text in world.documents(split)))
        for split in ("train", "validation")
    }
    files["documents"] = ("chunks", document_stream(world, count))
    for name in FACT_SETS:
        if facts := world.fact_set(name):
            files[name] = ("facts", fact_stream(world, facts, count))
    for name, (what, rows) in files.items():
        path = args.output / f"{name}.jsonl"
        lines = [json.dumps(row, default=dataclasses.asdict) + "\n" for row in rows]
        content = "".join(lines).encode()
        storage.write_bytes(str(path), content)
        print(f"{path}: {len(lines):,} {what}, {len(content):,} bytes")
