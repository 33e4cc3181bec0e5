"""The sections of tables: learning and forgetting, and all runs."""

import math

from titan_smf.report.document import Block, Section, Table, Text
from titan_smf.report.estimates import HOW, Estimate
from titan_smf.report.methods import Comparison, Setting, forgotten_share
from titan_smf.report.runs import EvaluationSet, Run

NOTHING = "\N{EM DASH}"


def learning_and_forgetting(comparison: Comparison) -> Section:
    """One row a method: what it learned, what every other set lost."""
    settings = [setting for method in comparison.methods for setting in method.settings]
    target, kept = comparison.target, comparison.kept
    columns = ["method", "rate", "seeds", "numbers a step"]
    columns += [f"{target.label} before", f"{target.label} after"]
    for evaluated in kept:
        columns += [evaluated.label, forgetting_label(evaluated)]
    rows = [
        [
            *_names(setting),
            interval(setting.start(target)),
            interval(setting.end(target)),
            *(cell for evaluated in kept for cell in _kept(setting, evaluated)),
        ]
        for setting in settings
    ]
    blocks: list[Block] = [*_warnings(comparison)]
    caption = (
        f"{target.label}: {_items(comparison, target)}. What is to be kept: before "
        "\N{RIGHTWARDS ARROW} after, and what was lost in all and in % of the start. In brackets: "
        "95% intervals."
    )
    blocks.append(Table(caption, columns, rows))
    blocks += [Text(_rates_shown(comparison)), Text(HOW)]
    for evaluated in (s for s in comparison.sets if s != target):
        blocks.append(_before_and_after(comparison, settings, evaluated))
    return Section("Learning and forgetting", blocks)


def all_runs(comparison: Comparison) -> Section:
    """Every run that the report used, with its end points."""
    rows = []
    for method in comparison.methods:
        for run in sorted(method.runs, key=lambda run: (run.rate, run.seed or 0)):
            rows.append(
                [
                    method.name,
                    f"{run.rate:g}" + (" (chosen)" if run.is_chosen else ""),
                    NOTHING if run.seed is None else str(run.seed),
                    str(run.last_step),
                    *(_ends(run, evaluated) for evaluated in comparison.sets),
                    str(run.folder),
                ]
            )
    columns = ["method", "rate", "seed", "steps", *(s.label for s in comparison.sets), "folder"]
    caption = f"{len(rows)} runs, each set before \N{RIGHTWARDS ARROW} after"
    return Section("All runs", [Table(caption, columns, rows, folded=True)])


def forgetting_label(evaluated: EvaluationSet) -> str:
    """What `Run.forgotten` of a set is called."""
    return f"{evaluated.label} {'lost' if evaluated.metric.higher_is_better else 'rise'}"


def number(value: float, signed: bool = False) -> str:
    """Three decimals; a diverged run's value in words."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-0.000", "0.000").replace("-", "\N{MINUS SIGN}")


def interval(estimate: Estimate | None, share: str = "") -> str:
    """`0.781 [0.702, 0.850]`; with a share `0.031, 3.2% [0.010, 0.052]`."""
    if estimate is None:
        return NOTHING
    text = f"{number(estimate.mean)}, {share}" if share else number(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]"


def percent(share: float | None) -> str:
    """`3.2%`, or nothing where there is no share."""
    if share is None or not math.isfinite(share):
        return ""
    return f"{share:.1%}".replace("-0.0%", "0.0%").replace("-", "\N{MINUS SIGN}")


def size(numbers: float | None) -> str:
    """`12,800` or `3.41M`."""
    if numbers is None:
        return NOTHING
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if numbers >= unit:
            return f"{numbers / unit:.3g}{name}"
    return f"{numbers:,.0f}"


def _names(setting: Setting) -> list[str]:
    seeds = {run.seed for run in setting.runs} - {None}
    unset = sum(run.seed is None for run in setting.runs)
    return [
        setting.method,
        setting.rate,
        str(len(seeds) + unset),
        size(setting.numbers_per_step),
    ]


def _kept(setting: Setting, evaluated: EvaluationSet) -> list[str]:
    """Before and after; what was lost, of a score with its share of the start."""
    is_score = evaluated.metric.higher_is_better
    share = percent(setting.forgotten_share(evaluated)) if is_score else ""
    return [
        _arrow(setting.start(evaluated), setting.end(evaluated)),
        interval(setting.forgotten(evaluated), share),
    ]


def _arrow(start: Estimate | None, end: Estimate | None) -> str:
    texts = [NOTHING if estimate is None else number(estimate.mean) for estimate in (start, end)]
    return " \N{RIGHTWARDS ARROW} ".join(texts)


def _before_and_after(
    comparison: Comparison, settings: list[Setting], evaluated: EvaluationSet
) -> Table:
    rows = [
        [
            setting.method,
            setting.rate,
            interval(setting.start(evaluated)),
            interval(setting.end(evaluated)),
            interval(setting.forgotten(evaluated)),
            percent(setting.forgotten_share(evaluated)) or NOTHING,
        ]
        for setting in settings
    ]
    word = "lost" if evaluated.metric.higher_is_better else "rise"
    columns = ["method", "rate", "before", "after", word, f"{word}, % of before"]
    role = {"held_out": "held out", "target": "also a target"}.get(evaluated.role, evaluated.role)
    caption = f"{evaluated.label} ({role}), {_items(comparison, evaluated)}"
    return Table(caption, columns, rows, folded=True)


def _ends(run: Run, evaluated: EvaluationSet) -> str:
    ends = _arrow(run.start(evaluated.name), run.end(evaluated.name))
    share = percent(forgotten_share(run, evaluated)) if evaluated.role == "held_out" else ""
    return f"{ends} ({share})" if share else ends


def _items(comparison: Comparison, evaluated: EvaluationSet) -> str:
    """How many items a set has, in words."""
    name = evaluated.name
    counts = sorted({run.counts[name] for run in comparison.runs if name in run.counts})
    return f"{' or '.join(f'{count:,}' for count in counts) or 'unknown number of'} items"


def _warnings(comparison: Comparison) -> list[Text]:
    """The caveat for methods that ran with one seed."""
    single = [method.name for method in comparison.methods if len(method.by_seed) == 1]
    if not single:
        return []
    who = "all methods" if len(single) == len(comparison.methods) else "; ".join(single)
    return [
        Text(
            f"One seed only: {who}. Another seed may order methods differently; take differences "
            "as a finding only where several seeds agree.",
            strong=True,
        )
    ]


def _rates_shown(comparison: Comparison) -> str:
    """Which rates the rows have."""
    without = [method.name for method in comparison.methods if method.chosen is None]
    chosen = "Rates are those of chosen.json, which were chosen on tuning facts."
    if not without:
        return chosen
    if len(without) == len(comparison.methods):
        return (
            "No rate was chosen on other facts (no chosen.json): there is a row for each rate. "
            "Picking the best one by this table would favour methods with more rates."
        )
    return f"{chosen} None was chosen for: {'; '.join(without)}; they have a row for each rate."
