"""The section to look at first: what learning cost each method, a table for each set to keep."""

from statistics import fmean

from titan_smf.report.document import Block, Section, Table, Text
from titan_smf.report.frontier import Matched
from titan_smf.report.matched import BOUND
from titan_smf.report.methods import Comparison, Method
from titan_smf.report.runs import EvaluationSet
from titan_smf.report.tables import NOTHING, forgetting_label, number

LEVELS = tuple(tenth / 10 for tenth in range(1, 10))
TITLE = "At a glance"

HOW_TO_READ = (
    "What each method had lost where it had learned as much as the column says, as a mean over its "
    f"seeds; {BOUND.strip()} where it is a bound on some seed. {NOTHING}: no seed learned that "
    'much. The seeds one by one are under "Forgetting at matched learning".'
)


def at_a_glance(comparison: Comparison) -> Section | None:
    """For each set to keep a table of methods and levels of learning; None if none is reached."""
    tables: list[Block] = []
    for place, evaluated in enumerate(comparison.kept):
        rows = {m.name: _costs(m, comparison.target, evaluated) for m in comparison.methods}
        reached = [level for level in LEVELS if any(costs[level] for costs in rows.values())]
        if reached:
            columns = ["method", "seeds", *(f"{level:.1f}" for level in reached)]
            cells = [
                [
                    method.name,
                    str(len(method.by_seed)),
                    *(_cell(rows[method.name][level], len(method.by_seed)) for level in reached),
                ]
                for method in comparison.methods
            ]
            caption = f"{forgetting_label(evaluated)} where {comparison.target.label} has come to"
            tables.append(Table(caption, columns, cells, folded=place > 0))
    return Section(TITLE, [Text(HOW_TO_READ), *tables]) if tables else None


def _costs(
    method: Method, target: EvaluationSet, evaluated: EvaluationSet
) -> dict[float, list[Matched]]:
    """What each level costs, on the seeds that reach it."""
    return {
        level: [
            matched
            for matched, _ in method.matched(
                target, evaluated, dict.fromkeys(method.by_seed, level)
            ).values()
        ]
        for level in LEVELS
    }


def _cell(costs: list[Matched], seeds: int) -> str:
    """The mean of all seeds; one of some of them would be of other seeds in each column."""
    if not costs:
        return NOTHING
    if len(costs) < seeds:
        return f"{len(costs)} of {seeds} seeds"
    bound = BOUND if any(cost.is_bound for cost in costs) else ""
    return bound + number(fmean(cost.forgetting for cost in costs))
