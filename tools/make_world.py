#!/usr/bin/env python
"""Write the text of a small invented world: people, towns, books and companies, and facts of them.

    python tools/make_world.py outputs/world --facts 2000

OUTPUT/train.jsonl and OUTPUT/validation.jsonl hold one document a line, `{"text": ...}`. The same
settings give the same bytes everywhere. Exit codes: 0 done, 2 settings that cannot be used.
"""

import argparse
import json
import sys
from pathlib import Path

from titan_smf.data.synthetic import World
from titan_smf.errors import UserError


def write_world(world: World, output: Path) -> None:
    """Write both splits and say how large they are."""
    output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        path = output / f"{split}.jsonl"
        documents = list(world.documents(split))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        print(f"{path}: {len(documents):,} documents, {path.stat().st_size:,} bytes")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0, help="chooses names, facts and wording")
    parser.add_argument("--facts", type=int, default=2000, help="facts that the text states")
    args = parser.parse_args()
    try:
        write_world(World(args.seed, args.facts), args.output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
