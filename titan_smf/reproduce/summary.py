"""What complete runs learned and kept, as a table for the terminal."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from titan_smf.reproduce.plan import Plan
from titan_smf.reproduce.runs import Run, chosen_rates, planned_runs, results_at


def summary(plan: Plan) -> str:
    """One row for each arm and rate, every set before and after; means over seeds.

    Of an arm with a chosen rate there is that rate alone.
    """
    chosen = chosen_rates(plan)
    runs: dict[tuple[str, float], list[Run]] = defaultdict(list)
    for run in planned_runs(plan):
        if not run.tuning and run.rate == chosen.get(run.arm.name, run.rate):
            runs[run.arm.name, run.rate].append(run)
    scores = {key: _scores(plan, of_key) for key, of_key in runs.items()}
    sets = list(dict.fromkeys(name for row in scores.values() for name in row))
    table = [["method", "rate", *sets]]
    for (name, rate), row in scores.items():
        table.append([name, f"{rate:g}", *(row.get(each, "") for each in sets)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    if len(plan.reproduce.seeds) == 1:
        lines += ["", "One seed: another may order the methods differently."]
    return "\n".join(lines)


def _scores(plan: Plan, runs: Sequence[Run]) -> dict[str, str]:
    """By set and its first metric: the mean before, and after."""
    values: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for run in runs:
        for end in (0, 1):
            for line in results_at(run.folder(plan), last=bool(end)):
                metric, value = next(iter(line["metrics"].items()))
                values[f"{line['set']} {metric}"][end].append(value["mean"])
    return {
        name: f"{fmean(before):.3f} -> {fmean(after):.3f}"
        for name, (before, after) in values.items()
        if before and after
    }
