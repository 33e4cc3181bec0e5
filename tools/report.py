#!/usr/bin/env python
"""What finished runs learned and forgot: tables and pictures as markdown and as one HTML page.

    tools/report.py RUN_OR_ROOT ... --output FOLDER

Folders are searched for runs that were evaluated before and after training (results.jsonl). Runs
with the same job.description are one method, at different rates and seeds. FOLDER gets report.md,
report.html, which needs no other file, and the pictures. Exit codes: 0 done, 2 a mistake.
"""

import argparse
import sys
from pathlib import Path

from titan_smf.errors import exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_ROOT")
    parser.add_argument("--output", required=True, type=Path, help="folder, made if it is missing")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    # Only now: --help does without matplotlib.
    from titan_smf.report.write import write_report

    print("\n".join(map(str, write_report(args.runs, args.output))))


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(exit_code(lambda: run(arguments)))
