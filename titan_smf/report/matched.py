"""The section of forgetting at matched learning: what each seed lost, and against the baselines."""

from collections.abc import Mapping

from titan_smf.report.document import Block, Section, Table, Text
from titan_smf.report.frontier import DEFINITION, Matched, frontier
from titan_smf.report.methods import Comparison, Method
from titan_smf.report.runs import EvaluationSet
from titan_smf.report.tables import NOTHING, forgetting_label, number, percent

LEVELS = (0.5, 0.6, 0.7, 0.8)
BASELINES = ("full", "lora")
"""Kinds of methods against which the others are held."""
BOUND = "\N{LESS-THAN OR EQUAL TO} "
LEAST = "\N{GREATER-THAN OR EQUAL TO} "
RATIO = "\N{DIVISION SIGN}"

HOW_TO_READ = (
    "One table for each set to keep and each level of learning: what every method lost on each "
    f"seed where it has learned as much. Under {RATIO} its loss divided by that baseline's, seed "
    "by seed in the order of the columns: 0.25 is a quarter of the baseline's loss. Seeds are "
    f"never mixed; there is no ratio ({NOTHING}) where one of the two did not reach the level or "
    f"the baseline lost nothing. A method's bound gives a bound of the ratio ({BOUND.strip()}), "
    f"the baseline's bound the least that it can be ({LEAST.strip()}), two bounds nothing (?). "
    "Ratios of losses near nothing say little, so read them beside the losses. Where full "
    "finetuning or LoRA does not reach the lowest of the fixed levels on every seed, there is a "
    "table at the most that it learned, on each seed its own."
)

Levels = Mapping[int | None, float]
"""The level of learning on each seed."""
Costs = dict[int | None, tuple[Matched, float | None]]
"""What a method lost there, as `Method.matched` has it."""


def matched_learning(comparison: Comparison) -> Section:
    """What the same amount of learning costs each method, for each set to keep."""
    blocks: list[Block] = _missing_rates(comparison)
    for place, evaluated in enumerate(comparison.kept):
        blocks += _of_set(comparison, evaluated, folded=place > 0)
    if not comparison.kept:
        blocks.append(Text("No held-out set and no background was evaluated."))
    return Section("Forgetting at matched learning", [Text(HOW_TO_READ), *blocks, Text(DEFINITION)])


def baseline_levels(
    baseline: Method, target: EvaluationSet, evaluated: EvaluationSet
) -> dict[int | None, float]:
    """Returns by seed the most that a method learned; none of seeds without a finite point."""
    points = baseline.points(target, evaluated)
    return {seed: best[-1].learning for seed, all_ in points.items() if (best := frontier(all_))}


def ratio(cost: Matched, baseline: Matched) -> str:
    """A loss divided by a baseline's at the same learning, as `HOW_TO_READ` says."""
    if not (baseline.forgetting > 0):
        return NOTHING
    if baseline.is_bound and (cost.is_bound or cost.forgetting < 0):
        return "?"
    sign = BOUND if cost.is_bound else LEAST if baseline.is_bound else ""
    text = f"{cost.forgetting / baseline.forgetting:.2f}".replace("-0.00", "0.00")
    return sign + text.replace("-", "\N{MINUS SIGN}")


def _missing_rates(comparison: Comparison) -> list[Block]:
    """The caveat for seeds on which not all rates of a method ran."""
    missing = [
        f"{method.name}, {len(runs)} of {len(method.by_rate)} on seed {seed}"
        for method in comparison.methods
        for seed, runs in method.by_seed.items()
        if seed is not None and len(runs) < len(method.by_rate)
    ]
    if not missing:
        return []
    text = (
        "Not every rate ran on every seed, and the missing ones might have learned more or lost "
        f"less: {'; '.join(missing)}."
    )
    return [Text(text, strong=True)]


def _of_set(comparison: Comparison, evaluated: EvaluationSet, folded: bool) -> list[Block]:
    """The tables of one set, those of fixed levels before those of baselines."""
    lost, target = forgetting_label(evaluated), comparison.target
    seeds = list(dict.fromkeys(seed for method in comparison.methods for seed in method.by_seed))
    seeds.sort(key=lambda seed: (seed is None, seed or 0))
    tables: list[Block] = []
    unreached = []
    for level in LEVELS:
        found = _table(comparison, evaluated, dict.fromkeys(seeds, level), f"{level:g}", folded)
        if found:
            tables.append(found)
        else:
            unreached.append(f"{level:g}")
    if unreached:
        tables.append(Text(f"{lost}: {target.label} {', '.join(unreached)} not reached by any."))
    for baseline in comparison.methods:
        levels = baseline_levels(baseline, target, evaluated)
        if baseline.kind in BASELINES and any(level < LEVELS[0] for level in levels.values()):
            reached = ", ".join(number(levels[seed]) for seed in seeds if seed in levels)
            what = f"{reached}, the most that {baseline.name} learned"
            if table := _table(comparison, evaluated, levels, what, folded):
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
    columns = ["method"]
    columns += ["lost, no seed" if seed is None else f"lost, seed {seed}" for seed in levels]
    if not evaluated.metric.higher_is_better:
        columns = [column.replace("lost", "rise") for column in columns]
    columns += [f"{RATIO} {baseline.name}" for baseline, _ in baselines]
    caption = f"{forgetting_label(evaluated)} at {comparison.target.label} {what}"
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
    shown = percent(share) if evaluated.metric.higher_is_better else ""
    return f"{text}, {shown}" if shown else text


def _ratios(costs: Costs, baseline: Costs, levels: Levels) -> str:
    """The ratio on each seed; runs without a seed are no pairs."""
    return ", ".join(
        ratio(costs[seed][0], baseline[seed][0])
        if seed is not None and seed in costs and seed in baseline
        else NOTHING
        for seed in levels
    )
