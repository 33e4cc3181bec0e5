"""What complete runs learned and kept: a table for the terminal, and reports."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from titan_smf.report.write import write_report
from titan_smf.reproduce.plan import Plan, slug
from titan_smf.reproduce.runs import Run, chosen_rates, planned_runs
from titan_smf.runtime import format_table


def write_reports(plan: Plan) -> list[Path]:
    """Write a report for each group of arms with complete runs; returns the HTML pages.

    The report of the first group has the analyses of accesses; those of the others have the arms
    of the first group too, to compare with.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for run in planned_runs(plan):
        if not run.tuning and run.completed() is not None:
            groups[run.arm.group].append(run.folder)
    root = Path(plan.reproduce.folder)
    beside = [folder for folder in [root / "analysis"] if folder.is_dir()]
    pages = []
    for group, folders in groups.items():
        written = write_report(folders + beside, root / "report" / slug(group))
        pages += [path for path in written if path.suffix == ".html"]
        beside = next(iter(groups.values()))
    return pages


def summary(plan: Plan) -> str:
    """Return a table with a row for each arm and rate, and each set's scores before and after.

    Scores are means over seeds. An arm with a chosen rate is shown at that rate alone.
    """
    chosen = chosen_rates(plan)
    runs: dict[tuple[str, float], list[Run]] = defaultdict(list)
    for run in planned_runs(plan):
        if not run.tuning and run.rate == chosen.get(run.arm.name, run.rate):
            runs[run.arm.name, run.rate].append(run)
    scores = {key: _scores(of_key) for key, of_key in runs.items()}
    sets = list(dict.fromkeys(name for row in scores.values() for name in row))
    table = [["method", "rate", *sets]]
    for (name, rate), row in scores.items():
        table.append([name, f"{rate:g}", *(row.get(each, "") for each in sets)])
    lines = [format_table(table)]
    if len(plan.reproduce.seeds) == 1:
        lines += ["", "One seed: another may order the methods differently."]
    return "\n".join(lines)


def _scores(runs: Sequence[Run]) -> dict[str, str]:
    """Return the mean of each set's first metric, before and after."""
    values: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for run in runs:
        for end in (0, 1):
            for line in run.results(last=bool(end)):
                metric, value = next(iter(line["metrics"].items()))
                values[f"{line['set']} {metric}"][end].append(value["mean"])
    return {
        name: f"{fmean(before):.3f} -> {fmean(after):.3f}"
        for name, (before, after) in values.items()
        if before and after
    }
