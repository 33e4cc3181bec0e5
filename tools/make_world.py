#!/usr/bin/env python
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

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_smf import storage
from titan_smf.errors import ConfigError, exit_code
from titan_smf.streams.world_streams import document_stream, fact_stream
from titan_smf.world.world import FACT_SETS, STREAM_STATEMENTS, World


def write_world(world: World, num_statements: int, output: Path) -> None:
    """Write all files and say how large they are."""
    files: dict[str, tuple[str, Iterable[Any]]] = {
        "train": ("documents", ({"text": text} for text in world.documents("train"))),
        "validation": ("documents", ({"text": text} for text in world.documents("validation"))),
        "documents": ("chunks", document_stream(world, num_statements)),
    }
    for name in FACT_SETS:
        if facts := world.fact_set(name):
            files[name] = ("facts", fact_stream(world, facts, num_statements))
    for name, (what, rows) in files.items():
        path = output / f"{name}.jsonl"
        lines = [json.dumps(row, default=dataclasses.asdict) + "\n" for row in rows]
        content = "".join(lines).encode()
        storage.write_bytes(str(path), content)
        print(f"{path}: {len(lines):,} {what}, {len(content):,} bytes")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="chooses names, facts and wording")
    parser.add_argument("--facts", type=int, default=2000, help="facts that the text states")
    parser.add_argument("--new-facts", type=int, default=500, help="facts of the streams")
    parser.add_argument("--tuning-facts", type=int, default=0, help="facts to choose settings on")
    parser.add_argument(
        "--statements",
        type=int,
        default=STREAM_STATEMENTS,
        help="statements of a fact and rewrites of a chunk in the streams",
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    if args.statements < 1:
        raise ConfigError("--statements", args.statements, "1 or more")
    world = World(args.seed, args.facts, args.new_facts, args.tuning_facts)
    write_world(world, args.statements, args.output)


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(exit_code(lambda: run(arguments)))
