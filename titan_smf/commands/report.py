"""What finished runs learned and forgot: tables and pictures as markdown and as one HTML page.

    tools/report.py RUN_OR_ROOT ... --output FOLDER

Folders are searched for runs that were evaluated before and after training (results.jsonl). Runs
with the same job.description are one method, at different rates and seeds. FOLDER gets report.md,
report.html, which needs no other file, and the pictures. Exit codes: 0 done, 2 a mistake.
"""

from collections.abc import Sequence
from pathlib import Path

from titan_smf.commands.entry import make_parser


def main(argv: Sequence[str]) -> None:
    """Write a report over runs and print its files."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_ROOT")
    parser.add_argument("--output", required=True, type=Path, help="folder, made if it is missing")
    args = parser.parse_args(argv)
    from titan_smf.report.write import write_report

    print("\n".join(map(str, write_report(args.runs, args.output))))
