"""Runs put together: those of one method, those that learned the same, those that are compared."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from titan_smf.report.estimates import Estimate, mean_of, over_seeds
from titan_smf.report.frontier import Matched, Point, at_learning
from titan_smf.report.runs import ROLES, EvaluationSet, Run

ORDER_OF_KINDS = ("sparse_memory", "values", "lora", "full")

Levels = Mapping[int | None, float]
"""A level of learning for each seed."""
Costs = dict[int | None, tuple[Matched, float | None]]
"""By seed what was forgotten there, and its share of the seed's start."""


@dataclass(frozen=True)
class Setting:
    """The runs of a method with one rate, or those with the rates chosen for it: one a seed."""

    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def rate(self) -> str:
        """The rate as text; several where the seeds have different ones."""
        return ", ".join(f"{rate:g}" for rate in sorted({run.rate for run in self.runs}))

    @property
    def is_chosen(self) -> bool:
        return all(run.is_chosen for run in self.runs)

    @property
    def parameters_per_step(self) -> float | None:
        return mean_of(run.parameters_per_step for run in self.runs)

    def start(self, evaluated: EvaluationSet) -> Estimate | None:
        """Return the mean of `Run.start` over seeds."""
        return self._mean(lambda run: run.start(evaluated), *_possible(evaluated))

    def end(self, evaluated: EvaluationSet) -> Estimate | None:
        """Return the mean of `Run.end` over seeds."""
        return self._mean(lambda run: run.end(evaluated), *_possible(evaluated))

    def forgotten(self, evaluated: EvaluationSet) -> Estimate | None:
        """Return the mean of `Run.forgotten` over seeds; at most the start's upper bound."""
        start = self.start(evaluated)
        if start is None:
            return None
        low = start.mean if start.low is None else start.low
        high = start.mean if start.high is None else start.high
        limits = (low - 1.0, high) if evaluated.is_score else (-high, math.inf)
        return self._mean(lambda run: run.forgotten(evaluated), *limits)

    def forgotten_share(self, evaluated: EvaluationSet) -> float | None:
        """Return the mean of `Run.forgotten_share` over seeds."""
        return mean_of(run.forgotten_share(evaluated) for run in self.runs)

    def _mean(
        self, of: Callable[[Run], Estimate | None], least: float, most: float
    ) -> Estimate | None:
        found = [estimate for run in self.runs if (estimate := of(run)) is not None]
        return over_seeds(found, least, most) if found else None


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
        return [Setting(tuple(run for run in self.runs if run.rate == rate)) for rate in rates]

    @property
    def by_seed(self) -> dict[int | None, list[Run]]:
        seeds: dict[int | None, list[Run]] = {}
        for run in self.runs:
            seeds.setdefault(run.seed, []).append(run)
        return seeds

    @property
    def chosen(self) -> Setting | None:
        """The runs at the chosen rate; None if none was chosen, or no run has it."""
        runs = tuple(run for run in self.runs if run.is_chosen)
        return Setting(runs) if runs else None

    @property
    def settings(self) -> list[Setting]:
        """What tables show: the chosen rate, or every one."""
        return [self.chosen] if self.chosen else self.by_rate

    def shown(self, target: EvaluationSet) -> Setting:
        """Return what a picture shows: the chosen rate, or else the one that learned most."""

        def learned(setting: Setting) -> float:
            end = setting.end(target)
            return -math.inf if end is None or math.isnan(end.mean) else end.mean

        return self.chosen or max(self.by_rate, key=learned)

    def points(
        self, target: EvaluationSet, evaluated: EvaluationSet
    ) -> dict[int | None, list[Point]]:
        """Return by seed what the runs learned of the target and forgot of a set."""
        return {
            seed: [
                Point(learned.mean, forgotten.mean)
                for run in runs
                if (learned := run.end(target)) and (forgotten := run.forgotten(evaluated))
            ]
            for seed, runs in self.by_seed.items()
        }

    def matched(self, target: EvaluationSet, evaluated: EvaluationSet, levels: Levels) -> Costs:
        """Return what each seed forgot of a set at its level of learning the target.

        Seeds that have no level, do not reach it or were not evaluated on the set are left out.
        """
        found = {}
        for seed, points in self.points(target, evaluated).items():
            if seed in levels and (matched := at_learning(points, levels[seed])) is not None:
                starts = [run.start(evaluated) for run in self.by_seed[seed]]
                start = mean_of(start.mean for start in starts if start)
                found[seed] = matched, matched.forgetting / start if start else None
        return found


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
    """Return the comparisons that can be made of runs, one for each target, by its name.

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
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
        for found in list(run.values):
            known = sets.setdefault(found.name, found)
            if known != found:
                del run.values[found]
                notes.append(
                    f"{run.folder}: left out {found.name}, it is {found.role} {found.kind} here "
                    f"and {known.role} {known.kind} in other runs"
                )
    methods = [Method(name, _to_compare(runs, notes)) for name, runs in by_method.items()]
    for method in methods:
        rates = {run.chosen_rate for run in method.runs if run.chosen_rate is not None}
        if rates and method.chosen is None:
            named = ", ".join(f"{rate:g}" for rate in sorted(rates))
            notes.append(f"{method.name}: no run has the chosen rate {named}; all rates are shown")
    ordered_sets = sorted(sets.values(), key=lambda s: ROLES.index(s.role))
    return Comparison(target, tuple(sorted(methods, key=_order)), tuple(ordered_sets), notes)


def _to_compare(runs: Sequence[Run], notes: list[str]) -> tuple[Run, ...]:
    """The runs of one method that are at their end, one for each rate and seed."""
    if len({run.rate for run in runs}) == 1 and len({run.other_rate for run in runs}) > 1:
        # A method may sweep the other rate: that of the values where all else is frozen.
        for run in runs:
            run.rate, run.other_rate = run.other_rate, run.rate
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


def _possible(evaluated: EvaluationSet) -> tuple[float, float]:
    return (0.0, 1.0) if evaluated.is_score else (-math.inf, math.inf)


def _order(method: Method) -> tuple[int, list[tuple[int, str]]]:
    """Order methods of a kind together, t=50 before t=100."""
    kinds = (*ORDER_OF_KINDS, method.kind)
    parts = re.split(r"(\d+)", method.name.casefold())
    return kinds.index(method.kind), [(int(p) if p.isdecimal() else -1, p) for p in parts]
