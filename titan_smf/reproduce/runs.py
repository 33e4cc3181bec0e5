"""The runs of a plan, their results, and the rates that are chosen by them."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from titan_smf.errors import ConfigError
from titan_smf.reproduce.plan import Arm, Plan, slug
from titan_smf.storage import read_lines, write_json

COMPLETE = "complete.json"
"""In the folder of a complete run: its settings, and the seconds it took."""


@dataclass(frozen=True)
class Run:
    """One arm at one rate and seed, on the facts for tuning or those that are reported."""

    arm: Arm
    seed: int
    rate: float
    tuning: bool

    def __str__(self) -> str:
        what = ", tuning" if self.tuning else ""
        return f"{self.arm.name}, rate {self.rate:g}, seed {self.seed}{what}"

    def folder(self, plan: Plan) -> Path:
        """Where its results are."""
        kind = "tuning" if self.tuning else "runs"
        root = Path(plan.reproduce.folder, kind, f"seed-{self.seed}")
        return root / slug(self.arm.name) / f"rate-{self.rate:g}"

    def completed(self, plan: Plan) -> dict[str, Any] | None:
        """The settings and seconds of the run if it is complete, else None.

        Raises:
            ConfigError: `reproduce.folder` is no folder.
        """
        try:
            done = json.loads((self.folder(plan) / COMPLETE).read_text())
        except (FileNotFoundError, ValueError):  # or torn: it is run again
            return None
        except NotADirectoryError:
            folder = plan.reproduce.folder
            raise ConfigError("reproduce.folder", folder, "a folder, not a file") from None
        return done if isinstance(done, dict) and done.keys() >= {"settings", "seconds"} else None


def planned_runs(plan: Plan) -> Iterator[Run]:
    """All runs of a plan, in order."""
    for seed in plan.reproduce.seeds:
        for arm in plan.arms:
            for rate in arm.rates:
                if arm.tune and seed == plan.reproduce.tuning_seed:
                    yield Run(arm, seed, rate, tuning=True)
                yield Run(arm, seed, rate, tuning=False)


def runs_folder(plan: Plan) -> Path:
    """The folder of the runs that are reported, and of the chosen rates."""
    return Path(plan.reproduce.folder, "runs")


def analyses_folder(plan: Plan) -> Path:
    """The folder of the analyses of accesses, one a seed."""
    return Path(plan.reproduce.folder, "analysis")


def chosen_rates(plan: Plan) -> dict[str, float]:
    """The rates in `chosen.json`, by arm; empty if none was chosen yet."""
    path = runs_folder(plan) / "chosen.json"
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # or torn: it is written again
        return {}


def save_rates(plan: Plan) -> None:
    """Choose the rates of the plan's arms, beside those of arms that it has not."""
    if rates := choose_rates(plan):
        write_json(runs_folder(plan) / "chosen.json", chosen_rates(plan) | rates)


def choose_rates(plan: Plan) -> dict[str, float]:
    """For each arm the rate with the highest sum of what is learned and kept of tuning facts.

    That is the target set's F1 plus the mean F1 of the held-out sets; the lower of equal rates.
    Empty if the plan has no runs for tuning.
    """
    scores: dict[str, dict[float, float]] = defaultdict(dict)
    for run in planned_runs(plan):
        if run.tuning:
            by_role: dict[str, list[float]] = defaultdict(list)
            for line in results_at(run.folder(plan), last=True):
                if "f1" in line["metrics"]:
                    by_role[line["role"]].append(line["metrics"]["f1"]["mean"])
            parts = [fmean(by_role[role]) for role in ("target", "held_out") if by_role[role]]
            scores[run.arm.name][run.rate] = sum(parts)
    return {
        name: max(sorted(rates), key=lambda rate: rates[rate]) for name, rates in scores.items()
    }


def complete_folders(plan: Plan) -> dict[str, list[Path]]:
    """The folders of complete runs that are reported, by the group of their arm."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for run in planned_runs(plan):
        if not run.tuning and run.completed(plan) is not None:
            folders[run.arm.group].append(run.folder(plan))
    return folders


def results_at(folder: Path, last: bool) -> list[dict[str, Any]]:
    """The lines of a run's `results.jsonl` from its last evaluation, or its first."""
    lines = [line for line in read_lines(folder / "results.jsonl") if not line.get("checkpoint")]
    steps = [line["step"] for line in lines]
    step = (max if last else min)(steps, default=0)
    return [line for line in lines if line["step"] == step]
