"""The runs of a plan, their results, and the rates that are chosen by them."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from titan_smf.reproduce.plan import Arm, Plan, slug
from titan_smf.storage import read_lines, write_json

COMPLETE = "complete.json"
"""In the folder of a complete run: its settings, and the seconds it took."""


@dataclass(frozen=True)
class Run:
    """One arm at one rate and seed, on the facts for tuning or those that are reported."""

    plan_folder: str
    arm: Arm
    seed: int
    rate: float
    tuning: bool

    def __str__(self) -> str:
        what = ", tuning" if self.tuning else ""
        return f"{self.arm.name}, rate {self.rate:g}, seed {self.seed}{what}"

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        kind = "tuning" if self.tuning else "runs"
        arm, rate = slug(self.arm.name), f"rate-{self.rate:g}"
        return Path(self.plan_folder, kind, f"seed-{self.seed}", arm, rate)

    def completed(self) -> dict[str, Any] | None:
        """Return the settings and seconds of the run if it is complete, else None."""
        done = _read_json(self.folder / COMPLETE)
        return done if done.keys() >= {"settings", "seconds"} else None

    def results(self, last: bool) -> list[dict[str, Any]]:
        """Return the lines of `results.jsonl` from the run's last evaluation, or its first."""
        lines = read_lines(self.folder / "results.jsonl")
        lines = [line for line in lines if not line.get("checkpoint")]
        step = (max if last else min)((line["step"] for line in lines), default=0)
        return [line for line in lines if line["step"] == step]


def planned_runs(plan: Plan) -> Iterator[Run]:
    """Yield all runs of a plan, in order."""
    for seed in plan.reproduce.seeds:
        for arm in plan.arms:
            for rate in arm.rates:
                if arm.tune and seed == plan.reproduce.tuning_seed:
                    yield Run(plan.reproduce.folder, arm, seed, rate, tuning=True)
                yield Run(plan.reproduce.folder, arm, seed, rate, tuning=False)


def chosen_rates(plan: Plan) -> dict[str, float]:
    """Return the rates in `chosen.json`, by arm; empty if none was chosen yet."""
    return _read_json(_chosen_file(plan))


def save_rates(plan: Plan) -> None:
    """Choose the rates of the plan's arms, beside those of arms that it has not."""
    if rates := choose_rates(plan):
        write_json(_chosen_file(plan), chosen_rates(plan) | rates)


def choose_rates(plan: Plan) -> dict[str, float]:
    """Choose for each arm the rate that learns and keeps most of the tuning facts.

    That is the highest sum of the target set's F1 and the mean F1 of the held-out sets; the lower
    of equal rates. Empty if the plan has no runs for tuning.
    """
    scores: dict[str, dict[float, float]] = defaultdict(dict)
    for run in planned_runs(plan):
        if run.tuning:
            by_role: dict[str, list[float]] = defaultdict(list)
            for line in run.results(last=True):
                if "f1" in line["metrics"]:
                    by_role[line["role"]].append(line["metrics"]["f1"]["mean"])
            parts = [fmean(by_role[role]) for role in ("target", "held_out") if by_role[role]]
            scores[run.arm.name][run.rate] = sum(parts)
    return {
        name: max(sorted(rates), key=lambda rate: rates[rate]) for name, rates in scores.items()
    }


def _chosen_file(plan: Plan) -> Path:
    return Path(plan.reproduce.folder, "runs", "chosen.json")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if it is not there, or torn: it is then written again."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
