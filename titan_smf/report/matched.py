"""The sections of forgetting at matched learning: an overview, and seed by seed with baselines."""

from statistics import fmean

from titan_smf.report.document import EXPLANATIONS, Block, Section, Table, Text
from titan_smf.report.frontier import Matched, frontier
from titan_smf.report.methods import Comparison, Costs, Levels, Method
from titan_smf.report.runs import EvaluationSet
from titan_smf.report.tables import NOTHING, number, percent

OVERVIEW_LEVELS = tuple(tenth / 10 for tenth in range(1, 10))
LEVELS = (0.5, 0.6, 0.7, 0.8)
BASELINES = ("full", "lora")
"""Kinds of methods with which the others are compared."""
BOUND = "\N{LESS-THAN OR EQUAL TO} "
LEAST = "\N{GREATER-THAN OR EQUAL TO} "
RATIO = "\N{DIVISION SIGN}"


def at_a_glance(comparison: Comparison) -> Section | None:
    """Return for each set to keep a table of methods and levels; None if no level is reached."""
    tables: list[Block] = []
    for place, evaluated in enumerate(comparison.kept):
        rows = {
            (method.name, len(method.by_seed)): {
                level: method.matched(
                    comparison.target, evaluated, dict.fromkeys(method.by_seed, level)
                )
                for level in OVERVIEW_LEVELS
            }
            for method in comparison.methods
        }
        reached = [level for level in OVERVIEW_LEVELS if any(row[level] for row in rows.values())]
        if reached:
            columns = ["method", "seeds", *(f"{level:.1f}" for level in reached)]
            cells = [
                [name, str(seeds), *(_mean_cost(row[level], seeds) for level in reached)]
                for (name, seeds), row in rows.items()
            ]
            caption = f"{evaluated.forgetting_label} where {comparison.target.label} has come to"
            tables.append(Table(caption, columns, cells, folded=place > 0))
    return Section("At a glance", [Text(EXPLANATIONS["at_a_glance"]), *tables]) if tables else None


def _mean_cost(costs: Costs, seeds: int) -> str:
    """The mean of all seeds; that of some would be over other seeds in each column."""
    if not costs:
        return NOTHING
    if len(costs) < seeds:
        return f"{len(costs)} of {seeds} seeds"
    bound = BOUND if any(matched.is_bound for matched, _ in costs.values()) else ""
    return bound + number(fmean(matched.forgetting for matched, _ in costs.values()))


def matched_learning(comparison: Comparison) -> Section:
    """Return what the same amount of learning costs each method, for each set to keep."""
    blocks: list[Block] = [Text(EXPLANATIONS["matched_learning"]), *_missing_rates(comparison)]
    for place, evaluated in enumerate(comparison.kept):
        blocks += _of_set(comparison, evaluated, folded=place > 0)
    if not comparison.kept:
        blocks.append(Text("No held-out set and no background was evaluated."))
    blocks.append(Text(EXPLANATIONS["frontier"]))
    return Section("Forgetting at matched learning", blocks)


def ratio(cost: Matched, baseline: Matched) -> str:
    """Return a loss divided by a baseline's at the same learning, marked if it is a bound."""
    if not (baseline.forgetting > 0):
        return NOTHING
    if baseline.is_bound and (cost.is_bound or cost.forgetting < 0):
        return "?"
    sign = BOUND if cost.is_bound else LEAST if baseline.is_bound else ""
    text = f"{cost.forgetting / baseline.forgetting:.2f}".replace("-0.00", "0.00")
    return sign + text.replace("-", "\N{MINUS SIGN}")


def _missing_rates(comparison: Comparison) -> list[Text]:
    """The caveat for seeds on which not all rates of a method ran."""
    missing = "; ".join(
        f"{method.name}, {len(runs)} of {len(method.by_rate)} on seed {seed}"
        for method in comparison.methods
        for seed, runs in method.by_seed.items()
        if seed is not None and len(runs) < len(method.by_rate)
    )
    text = EXPLANATIONS["missing_rates"].format(missing=missing)
    return [Text(text, strong=True)] if missing else []


def _of_set(comparison: Comparison, evaluated: EvaluationSet, folded: bool) -> list[Block]:
    """The tables of one set, those of fixed levels before those of baselines."""
    target = comparison.target
    seeds = list({seed for method in comparison.methods for seed in method.by_seed})
    seeds.sort(key=lambda seed: (seed is None, seed or 0))
    tables: list[Block] = []
    unreached = []
    for level in LEVELS:
        table = _table(comparison, evaluated, dict.fromkeys(seeds, level), f"{level:g}", folded)
        if table:
            tables.append(table)
        else:
            unreached.append(f"{level:g}")
    if unreached:
        label = f"{evaluated.forgetting_label}: {target.label}"
        tables.append(Text(f"{label} {', '.join(unreached)} not reached by any."))
    for baseline in comparison.methods:
        points = baseline.points(target, evaluated)
        most = {seed: best[-1].learning for seed in points if (best := frontier(points[seed]))}
        if baseline.kind in BASELINES and any(level < LEVELS[0] for level in most.values()):
            reached = ", ".join(number(most[seed]) for seed in seeds if seed in most)
            what = f"{reached}, the most that {baseline.name} learned"
            if table := _table(comparison, evaluated, most, what, folded):
                tables.append(table)
    return tables


def _table(
    comparison: Comparison, evaluated: EvaluationSet, levels: Levels, what: str, folded: bool
) -> Table | None:
    """The methods that reach a level on some seed; None if none does."""
    matched = [(m, m.matched(comparison.target, evaluated, levels)) for m in comparison.methods]
    reached = [(method, costs) for method, costs in matched if costs]
    if not reached:
        return None
    baselines = [(method, costs) for method, costs in reached if method.kind in BASELINES]
    rows = [
        [
            method.name,
            *(_lost(method, costs, seed, evaluated) for seed in levels),
            *(
                "itself" if other is method else _ratios(costs, of_other, levels)
                for other, of_other in baselines
            ),
        ]
        for method, costs in reached
    ]
    change = evaluated.change
    columns = ["method"]
    columns += [f"{change}, no seed" if s is None else f"{change}, seed {s}" for s in levels]
    columns += [f"{RATIO} {baseline.name}" for baseline, _ in baselines]
    caption = f"{evaluated.forgetting_label} at {comparison.target.label} {what}"
    if len(reached) < len(matched):
        others = "; ".join(method.name for method, costs in matched if not costs)
        caption += f". Not reached on any seed: {others}"
    return Table(caption, columns, rows, folded)


def _lost(method: Method, costs: Costs, seed: int | None, evaluated: EvaluationSet) -> str:
    """What was lost on a seed, of a score with its share of the start."""
    if seed not in costs:
        return "not reached" if seed in method.by_seed else NOTHING
    matched, share = costs[seed]
    text = (BOUND if matched.is_bound else "") + number(matched.forgetting)
    return ", ".join(filter(None, [text, percent(share) if evaluated.is_score else ""]))


def _ratios(costs: Costs, baseline: Costs, levels: Levels) -> str:
    """The ratio on each seed; runs without a seed are no pairs."""
    return ", ".join(
        ratio(costs[seed][0], baseline[seed][0])
        if seed is not None and seed in costs and seed in baseline
        else NOTHING
        for seed in levels
    )
