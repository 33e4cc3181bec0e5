"""Measure performance on the CPU, against plain alternatives timed in the same run.

    tools/bench.py                        everything: 15 minutes and more
    tools/bench.py --only product_key     one group of measures

Prints each measure as soon as it is known.
"""

import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from titan_smf.commands.entry import add_options, make_parser
from titan_smf.progress import format_duration

if TYPE_CHECKING:  # it imports torch
    from titan_smf.bench.measure import Measure

    Group = Callable[[int], Iterable[Measure]]

GROUPS = {
    "product_key": "lookup:product_key",
    "forward": "lookup:forward",
    "backward": "lookup:backward",
    "bytes": "lookup:received_bytes",
    "memory": "lookup:memory",
    "sparse": "sparse:sparse",
    "ranks": "ranks:ranks",
    "whole_step": "step:whole_step",
    "step_time": "training:step_time",
    "finetuning": "training:finetuning",
    "run_memory": "training:run_memory",
    "generation": "generation:generation",
}
"""The function of each group in `titan_smf/bench`, whose modules import torch."""

COLUMNS = "{:>7}  {:<74}  {:>6}  {:<12}  {}"


def main(argv: Sequence[str]) -> None:
    """Run groups of measures."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=GROUPS, action="append", help="may be repeated")
    add_options(
        parser,
        [("--threads", 2, "of this process"), ("--runs", 9, "timed runs of each alternative")],
    )
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    _print(f"{args.threads} threads, median of {args.runs}, torch {torch.__version__}")
    print_measures({name: load_group(name) for name in args.only or GROUPS}, args.runs)


def load_group(name: str) -> "Group":
    """Return the function of a group of measures."""
    return pkgutil.resolve_name(f"titan_smf.bench.{GROUPS[name]}")


def print_measures(groups: Mapping[str, "Group"], runs: int) -> None:
    """Print a line when a group starts, and one for each measure, with the time since the start."""
    begin = time.monotonic()
    printed = 0
    _print(COLUMNS.format("time", "measure", "value", "target", "note"))
    for name, measures in groups.items():
        _print(f"{format_duration(time.monotonic() - begin):>7}  running {name} ...")
        for measure in measures(runs):
            elapsed = format_duration(time.monotonic() - begin)
            value = f"{measure.value:.3g}"
            line = COLUMNS.format(elapsed, measure.name, value, measure.target, measure.note)
            _print(line.rstrip())
            printed += 1
    _print(f"{printed} measures in {format_duration(time.monotonic() - begin)}")


def _print(line: str) -> None:
    print(line, flush=True)
