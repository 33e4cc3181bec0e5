"""Runs put together: those of one method, those that learned the same, those that are compared."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from titan_smf.report.estimates import Estimate, over_seeds
from titan_smf.report.frontier import Matched, Point, at_learning
from titan_smf.report.runs import ROLES, EvaluationSet, Run

ORDER_OF_KINDS = ("sparse_memory", "values", "lora", "full")


@dataclass(frozen=True)
class Setting:
    """The runs of a method with one rate, or those with the rates chosen for it: one a seed."""

    method: str
    runs: tuple[Run, ...]
    is_chosen: bool

    @property
    def rate(self) -> str:
        """In words; several where the seeds have different ones."""
        return ", ".join(f"{rate:g}" for rate in sorted({run.rate for run in self.runs}))

    @property
    def numbers_per_step(self) -> float | None:
        known = [run.numbers_per_step for run in self.runs if run.numbers_per_step is not None]
        return math.fsum(known) / len(known) if known else None

    def estimate(
        self, evaluated: EvaluationSet, of: Callable[[Run], Estimate | None]
    ) -> Estimate | None:
        """Returns the mean over the runs that have a score of the set, None if none has.

        Args:
            of: gives it, between 0 and 1 if the metric is.
        """
        found = [estimate for run in self.runs if (estimate := of(run)) is not None]
        if not found:
            return None
        is_share = evaluated.metric.higher_is_better
        return over_seeds(found, 0.0, 1.0) if is_share else over_seeds(found)

    def start(self, evaluated: EvaluationSet) -> Estimate | None:
        return self.estimate(evaluated, lambda run: run.start(evaluated.name))

    def end(self, evaluated: EvaluationSet) -> Estimate | None:
        return self.estimate(evaluated, lambda run: run.end(evaluated.name))

    def forgotten(self, evaluated: EvaluationSet) -> Estimate | None:
        """`Run.forgotten`, averaged over seeds; no more than the start's high bound."""
        found = [e for run in self.runs if (e := run.forgotten(evaluated)) is not None]
        start = self.start(evaluated)
        if not found or start is None:
            return None
        low = start.mean if start.low is None else start.low
        high = start.mean if start.high is None else start.high
        if evaluated.metric.higher_is_better:
            return over_seeds(found, low - 1.0, high)
        return over_seeds(found, -high)

    def forgotten_share(self, evaluated: EvaluationSet) -> float | None:
        """`forgotten_share` of the runs, averaged over seeds."""
        return mean_of(forgotten_share(run, evaluated) for run in self.runs)


@dataclass(frozen=True)
class Method:
    """All runs with one description: one for each rate and seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def kind(self) -> str:
        return self.runs[0].kind

    @property
    def by_rate(self) -> list[Setting]:
        """By rising rate."""
        rates = sorted({run.rate for run in self.runs})
        return [
            Setting(self.name, tuple(r for r in self.runs if r.rate == rate), is_chosen=False)
            for rate in rates
        ]

    @property
    def chosen(self) -> Setting | None:
        """The runs at the chosen rate; None if none was chosen, or no run has it."""
        runs = tuple(run for run in self.runs if run.is_chosen)
        return Setting(self.name, runs, is_chosen=True) if runs else None

    @property
    def settings(self) -> list[Setting]:
        """What tables show: the chosen rate, or every one."""
        return [self.chosen] if self.chosen else self.by_rate

    def shown(self, target: EvaluationSet) -> Setting:
        """What a picture shows: the chosen rate, or else the one that learned most."""

        def learned(setting: Setting) -> float:
            end = setting.end(target)
            return -math.inf if end is None or math.isnan(end.mean) else end.mean

        return self.chosen or max(self.by_rate, key=learned)

    def points(
        self, target: EvaluationSet, evaluated: EvaluationSet
    ) -> dict[int | None, list[Point]]:
        """Returns by seed what the runs learned of the target and forgot of a set."""
        return {
            seed: [
                Point(learned.mean, forgotten.mean)
                for run in runs
                if (learned := run.end(target.name)) and (forgotten := run.forgotten(evaluated))
            ]
            for seed, runs in self.by_seed.items()
        }

    def matched(
        self, target: EvaluationSet, evaluated: EvaluationSet, levels: Mapping[int | None, float]
    ) -> dict[int | None, tuple[Matched, float | None]]:
        """Returns by seed what a level of learning costs, and its share of the seed's start.

        Seeds that do not reach the level are not in it; nor is one without evaluations of the set.

        Args:
            levels: of each seed; those without one are left out.
        """
        found = {}
        for seed, points in self.points(target, evaluated).items():
            if seed in levels and (matched := at_learning(points, levels[seed])) is not None:
                runs = self.by_seed[seed]
                start = mean_of(s.mean for r in runs if (s := r.start(evaluated.name)))
                found[seed] = matched, matched.forgetting / start if start else None
        return found

    @property
    def by_seed(self) -> dict[int | None, list[Run]]:
        """The runs of each seed."""
        seeds: dict[int | None, list[Run]] = {}
        for run in self.runs:
            seeds.setdefault(run.seed, []).append(run)
        return seeds


@dataclass(frozen=True)
class Comparison:
    """The methods that learned the same target, and what they were evaluated on."""

    target: EvaluationSet
    methods: tuple[Method, ...]
    sets: tuple[EvaluationSet, ...]
    """All sets of all runs, in the order of `ROLES`."""
    notes: list[str]
    """What could not be read or used, a sentence each; sections add to it."""

    @property
    def kept(self) -> list[EvaluationSet]:
        """What must not be forgotten: held-out sets, then background."""
        return [s for s in self.sets if s.role in ("held_out", "background")]

    @property
    def runs(self) -> list[Run]:
        return [run for method in self.methods for run in method.runs]


def compare(runs: Sequence[Run], notes: list[str]) -> list[Comparison]:
    """Returns the comparisons that can be made of runs, one for each target, by its name.

    Runs of one method, rate and seed beyond the first are left out and named in `notes`; so are
    those that have not come as far as others of their method.
    """
    by_target: dict[EvaluationSet, list[Run]] = {}
    for run in runs:
        assert run.target is not None, "such runs are left out when they are read"
        by_target.setdefault(run.target, []).append(run)
    return [_comparison(t, by_target[t], notes) for t in sorted(by_target, key=lambda t: t.name)]


def _comparison(target: EvaluationSet, runs: Sequence[Run], notes: list[str]) -> Comparison:
    sets = {target.name: target}
    for run in runs:
        for name, found in list(run.sets.items()):
            known = sets.setdefault(name, found)
            if known != found:
                del run.sets[name], run.values[name]
                notes.append(
                    f"{run.folder}: left out {name}, it is {found.role} {found.kind} here and "
                    f"{known.role} {known.kind} in other runs"
                )
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    methods = [Method(name, _to_compare(runs, notes)) for name, runs in by_method.items()]
    for method in methods:
        rates = {run.chosen[method.name] for run in method.runs if method.name in run.chosen}
        if rates and method.chosen is None:
            named = ", ".join(f"{rate:g}" for rate in sorted(rates))
            notes.append(f"{method.name}: no run has the chosen rate {named}; all rates are shown")
    return Comparison(
        target,
        tuple(sorted(methods, key=_order)),
        tuple(sorted(sets.values(), key=lambda s: ROLES.index(s.role))),
        notes,
    )


def forgotten_share(run: Run, evaluated: EvaluationSet) -> float | None:
    """What a run forgot of a set as a share of the score before it; None if that was 0."""
    start, forgotten = run.start(evaluated.name), run.forgotten(evaluated)
    return forgotten.mean / start.mean if forgotten and start and start.mean else None


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _to_compare(runs: Sequence[Run], notes: list[str]) -> tuple[Run, ...]:
    """The runs of one method that are at their end, one for each rate and seed."""
    if len({run.rate for run in runs}) == 1:
        # A method may sweep the other rate: that of the values where all else is frozen.
        other = {run.optimizer_rate if run.rate_is_of_values else run.values_rate for run in runs}
        for run in runs if len(other) > 1 else []:
            run.rate_is_of_values = not run.rate_is_of_values
    last = max(run.last_step for run in runs)
    first: dict[tuple[float, int], Run] = {}
    kept = []
    for run in runs:
        if run.last_step < last:
            notes.append(
                f"{run.folder}: left out, evaluated until step {run.last_step}, other runs of "
                f"{run.method} until step {last}"
            )
        elif run.seed is None:
            kept.append(run)  # each a draw of chance of its own
        elif (other_run := first.setdefault((run.rate, run.seed), run)) is run:
            kept.append(run)
        else:
            notes.append(
                f"{run.folder}: left out, {other_run.folder} has the same description, rate and "
                f"seed ({run.method}, {run.rate:g}, {run.seed})"
            )
    return tuple(kept)


def _order(method: Method) -> tuple[int, list[tuple[int, str]]]:
    """Methods of a kind together, t=50 before t=100."""
    kinds = (*ORDER_OF_KINDS, method.kind)
    parts = re.split(r"(\d+)", method.name.casefold())
    return kinds.index(method.kind), [(int(p) if p.isdecimal() else -1, p) for p in parts]
