"""The sections of tables, learning and forgetting and all runs, and numbers as text."""

import math

from titan_smf.report.document import EXPLANATIONS, Block, Section, Table, Text
from titan_smf.report.estimates import Estimate
from titan_smf.report.methods import Comparison, Setting
from titan_smf.report.runs import EvaluationSet, Run

NOTHING = "\N{EM DASH}"
ARROW = " \N{RIGHTWARDS ARROW} "


def learning_and_forgetting(comparison: Comparison) -> Section:
    """Return a row for each method: what it learned, what every other set lost."""
    settings = [setting for method in comparison.methods for setting in method.settings]
    target, kept = comparison.target, comparison.kept
    columns = ["method", "rate", "seeds", "trainable parameters per step"]
    columns += [f"{target.label} before", f"{target.label} after"]
    columns += [column for e in kept for column in (e.label, e.forgetting_label)]
    rows = [
        [
            setting.method,
            setting.rate,
            _seeds(setting),
            size(setting.parameters_per_step),
            interval(setting.start(target)),
            interval(setting.end(target)),
            *(cell for evaluated in kept for cell in _kept(setting, evaluated)),
        ]
        for setting in settings
    ]
    caption = (
        f"{target.label}: {_items(comparison, target)}. What is to be kept: before{ARROW}after, "
        "and what was lost in all and in % of the start. In brackets: 95% intervals."
    )
    blocks: list[Block] = [
        *_warnings(comparison),
        Table(caption, columns, rows),
        _rates_shown(comparison),
        Text(EXPLANATIONS["intervals"]),
    ]
    others = [s for s in comparison.sets if s != target]
    blocks += [_before_and_after(comparison, settings, evaluated) for evaluated in others]
    return Section("Learning and forgetting", blocks)


def all_runs(comparison: Comparison) -> Section:
    """Return a table of every run that the report used, with its metrics before and after."""
    rows = [
        [
            run.method,
            f"{run.rate:g}" + (" (chosen)" if run.is_chosen else ""),
            NOTHING if run.seed is None else str(run.seed),
            str(run.last_step),
            *(_ends(run, evaluated) for evaluated in comparison.sets),
            str(run.folder),
        ]
        for method in comparison.methods
        for run in sorted(method.runs, key=lambda run: (run.rate, run.seed or 0))
    ]
    columns = ["method", "rate", "seed", "steps", *(s.label for s in comparison.sets), "folder"]
    caption = f"{len(rows)} runs, each set before{ARROW}after"
    return Section("All runs", [Table(caption, columns, rows, folded=True)])


def number(value: float) -> str:
    """Return three decimals; "not finite" for a diverged run's value."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3f}".replace("-0.000", "0.000").replace("-", "\N{MINUS SIGN}")


def interval(estimate: Estimate | None, share: str = "") -> str:
    """Return `0.781 [0.702, 0.850]`; with a share `0.031, 3.2% [0.010, 0.052]`."""
    if estimate is None:
        return NOTHING
    text = f"{number(estimate.mean)}, {share}" if share else number(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]"


def percent(share: float | None) -> str:
    """Return `3.2%`, or nothing where there is no share."""
    if share is None or not math.isfinite(share):
        return ""
    return f"{share:.1%}".replace("-0.0%", "0.0%").replace("-", "\N{MINUS SIGN}")


def size(parameters: float | None) -> str:
    """Return `12,800` or `3.41M`."""
    if parameters is None:
        return NOTHING
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:,.0f}"


def _seeds(setting: Setting) -> str:
    """How many seeds; runs without one are draws of chance of their own."""
    seeds = {run.seed for run in setting.runs} - {None}
    return str(len(seeds) + sum(run.seed is None for run in setting.runs))


def _kept(setting: Setting, evaluated: EvaluationSet) -> list[str]:
    """Before and after; what was lost, of a score with its share of the start."""
    share = percent(setting.forgotten_share(evaluated)) if evaluated.is_score else ""
    return [_before_after(setting, evaluated), interval(setting.forgotten(evaluated), share)]


def _before_after(source: Setting | Run, evaluated: EvaluationSet) -> str:
    ends = (source.start(evaluated), source.end(evaluated))
    return ARROW.join(NOTHING if e is None else number(e.mean) for e in ends)


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
    change = evaluated.change
    columns = ["method", "rate", "before", "after", change, f"{change}, % of before"]
    role = {"held_out": "held out", "target": "also a target"}.get(evaluated.role, evaluated.role)
    caption = f"{evaluated.label} ({role}), {_items(comparison, evaluated)}"
    return Table(caption, columns, rows, folded=True)


def _ends(run: Run, evaluated: EvaluationSet) -> str:
    ends = _before_after(run, evaluated)
    share = percent(run.forgotten_share(evaluated)) if evaluated.role == "held_out" else ""
    return f"{ends} ({share})" if share else ends


def _items(comparison: Comparison, evaluated: EvaluationSet) -> str:
    """How many items a set has, as text."""
    counts = {run.counts[evaluated.name] for run in comparison.runs if evaluated.name in run.counts}
    return f"{' or '.join(f'{n:,}' for n in sorted(counts)) or 'unknown number of'} items"


def _warnings(comparison: Comparison) -> list[Text]:
    """The caveat for methods that ran with one seed."""
    single = [method.name for method in comparison.methods if len(method.by_seed) == 1]
    who = "all methods" if len(single) == len(comparison.methods) else "; ".join(single)
    return [Text(EXPLANATIONS["one_seed"].format(methods=who), strong=True)] if single else []


def _rates_shown(comparison: Comparison) -> Text:
    """Which rates the rows have."""
    without = [method.name for method in comparison.methods if method.chosen is None]
    name = "rates_chosen_for_some" if without else "rates_chosen"
    if len(without) == len(comparison.methods):
        name = "no_rates_chosen"
    return Text(EXPLANATIONS[name].format(methods="; ".join(without)))
