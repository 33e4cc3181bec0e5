"""Finished runs: the folders that hold one, and what their files say.

A run is a folder with `config.toml`, `metrics.jsonl` or `results.jsonl`. What cannot be read is
named in `notes`, one sentence each, and left out.
"""

import json
import math
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_smf.errors import UserError
from titan_smf.report.access import analyses_below
from titan_smf.report.estimates import Estimate

CONFIG, METRICS, RESULTS, CHOSEN = "config.toml", "metrics.jsonl", "results.jsonl", "chosen.json"
NO_DESCRIPTION = ("", "default job")  # the second one is torchtitan's default


@dataclass(frozen=True)
class Metric:
    """What a kind of set is measured by."""

    key: str
    """In results.jsonl."""
    label: str
    higher_is_better: bool


METRIC_OF_KIND = {
    "questions": Metric("f1", "F1", True),
    "choices": Metric("accuracy", "accuracy", True),
    "likelihood": Metric("nll", "NLL", False),
    "tokens": Metric("loss", "loss", False),
}
ROLES = ("target", "held_out", "background", "other")


@dataclass(frozen=True)
class EvaluationSet:
    """What a model was evaluated on."""

    name: str
    role: str
    """One of `ROLES`."""
    kind: str
    """A key of `METRIC_OF_KIND`."""

    @property
    def metric(self) -> Metric:
        return METRIC_OF_KIND[self.kind]

    @property
    def label(self) -> str:
        return f"{self.name} {self.metric.label}"


@dataclass
class Run:
    """One training run and its evaluations."""

    folder: Path
    config: dict[str, Any]
    chosen: dict[str, Any]
    """The rate of each method that chosen.json names."""
    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    values: dict[str, dict[int, Estimate]] = field(default_factory=dict)
    """Of each set's metric, by step."""
    counts: dict[str, int] = field(default_factory=dict)
    """Items of each set."""
    rate_is_of_values: bool = False
    """Whether `memory.value_lr` is the rate, and not `optimizer.lr`."""
    numbers_per_step: float | None = None
    """Trainable numbers that a step changes, averaged over the steps."""

    @property
    def kind(self) -> str:
        """`finetune.method`."""
        return str(self.config.get("finetune", {}).get("method", "full"))

    @property
    def method(self) -> str:
        """`job.description`; without one, the folder's name."""
        description = str(self.config.get("job", {}).get("description", ""))
        return self.folder.name if description in NO_DESCRIPTION else description

    @property
    def rate(self) -> float:
        """The learning rate of what this run trains."""
        return self.values_rate if self.rate_is_of_values else self.optimizer_rate

    @property
    def values_rate(self) -> float:
        """`memory.value_lr`."""
        return float(self.config.get("memory", {}).get("value_lr", math.nan))

    @property
    def optimizer_rate(self) -> float:
        """`optimizer.lr`."""
        return float(self.config.get("optimizer", {}).get("lr", math.nan))

    @property
    def seed(self) -> int | None:
        """`debug.seed`; None if the run had none."""
        return self.config.get("debug", {}).get("seed")

    @property
    def is_chosen(self) -> bool:
        """Whether this run has the rate that was chosen for its method."""
        rate = self.chosen.get(self.method)
        return rate is not None and math.isclose(float(rate), self.rate, rel_tol=1e-6)

    @property
    def last_step(self) -> int:
        """Of the evaluations."""
        return max(step for values in self.values.values() for step in values)

    @property
    def target(self) -> EvaluationSet | None:
        """The set that says how much was learned: the first one with the role, questions first."""
        targets = [s for s in self.sets.values() if s.role == "target"]
        scored = [s for s in targets if s.metric.higher_is_better]
        return min(scored, key=lambda s: s.kind != "questions", default=None)

    def start(self, name: str) -> Estimate | None:
        """Of a set before the first step."""
        return self.values.get(name, {}).get(0)

    def end(self, name: str) -> Estimate | None:
        """Of a set after the last step."""
        return self.values.get(name, {}).get(self.last_step)

    def forgotten(self, evaluated: EvaluationSet) -> Estimate | None:
        """How much worse a set became: the score lost, or the rise of a loss."""
        start, end = self.start(evaluated.name), self.end(evaluated.name)
        if start is None or end is None:
            return None
        return start.minus(end) if evaluated.metric.higher_is_better else end.minus(start)


def find_runs(paths: Sequence[Path], notes: list[str]) -> list[Run]:
    """Returns the runs with evaluations in folders and below them, by path, each once.

    Raises:
        UserError: there is neither a run nor an analysis of accesses in one of `paths`.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give the folders of finished runs")
        folders = list(_run_folders(path))
        if not folders and not analyses_below([path]):
            raise UserError(
                f"{path}: holds no run, neither itself nor in a folder below: no {CONFIG}, "
                f"{METRICS} or {RESULTS}; give the job.dump_folder of a training run, or one above"
            )
        chosen = _chosen_rates(path, notes)
        for folder in folders:
            if folder.resolve() not in runs and (run := read_run(folder, chosen, notes)):
                runs[folder.resolve()] = run
    if not runs and not analyses_below(paths):
        found = "\n  ".join(dict.fromkeys(notes))
        raise UserError(
            f"nothing to report, no run has evaluations after its training:\n  {found}\n"
            "train with evaluation.sets, or run tools/evaluate.py"
        )
    return [runs[folder] for folder in sorted(runs)]


def read_run(folder: Path, chosen: dict[Path, dict[str, Any]], notes: list[str]) -> Run | None:
    """Returns a run with evaluations before and after training, or None and says why in `notes`.

    Args:
        chosen: the content of chosen.json by the folder that it lies in, the outermost first.
    """
    rates: dict[str, Any] = {}
    for root, content in chosen.items():
        if folder.resolve().is_relative_to(root):
            rates |= content
    config = _read_config(folder / CONFIG, notes)
    if config is None:
        return None
    run = Run(folder, config, rates)
    run.rate_is_of_values = run.kind in ("sparse_memory", "values")
    if not (folder / RESULTS).is_file():
        notes.append(f"{folder}: left out, it has no {RESULTS}: not evaluated")
        return None
    lines = read_lines(folder / RESULTS, notes)
    own = [line for line in lines if line.get("checkpoint") is None]
    if own and len(own) < len(lines):
        notes.append(
            f"{folder}: left out {len(lines) - len(own)} results of tools/evaluate.py; those of "
            "the run itself are used"
        )
    for line in own or lines:
        _take_result(run, line, notes)
    metrics = read_lines(folder / METRICS, notes) if (folder / METRICS).is_file() else []
    _take_metrics(run, metrics)
    if math.isnan(run.rate):
        notes.append(f"{folder}: left out, {CONFIG} names no learning rate")
    elif not run.values:
        notes.append(f"{folder}: left out, {RESULTS} holds no evaluation")
    elif own and run.last_step < (steps := config.get("training", {}).get("steps", 0)):
        notes.append(f"{folder}: left out, it has come to step {run.last_step} of {steps}")
    elif run.last_step == 0:
        notes.append(f"{folder}: left out, evaluated before the first step only")
    elif run.target is None:
        notes.append(f"{folder}: left out, no target set of questions or choices was evaluated")
    elif run.end(run.target.name) is None:
        name = run.target.name
        notes.append(f"{folder}: left out, {name} was not evaluated at the end, {run.last_step}")
    else:
        _note_gaps(run, metrics, notes)
        return run
    return None


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a jsonl file; lines that are none are left out and named in `notes`."""
    lines, unreadable = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:  # no JSON, or no UTF-8
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            unreadable.append(number)
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        notes.append(f"{path}: left out {len(unreadable)} torn or unreadable lines: {shown}")
    return lines


def _run_folders(path: Path) -> Iterator[Path]:
    """The folders that look like a run, sorted; not what runs keep inside theirs."""
    for folder, below, files in os.walk(path):
        below[:] = sorted(n for n in below if n not in ("checkpoints", "tb") and n[0] != ".")
        if {CONFIG, METRICS, RESULTS} & set(files):
            yield Path(folder)


def _chosen_rates(path: Path, notes: list[str]) -> dict[Path, dict[str, Any]]:
    """Each chosen.json above and below a path by its folder, outer ones before those below."""
    above = [folder / CHOSEN for folder in path.resolve().parents]
    found = [*filter(Path.is_file, above), *path.resolve().rglob(CHOSEN)]
    chosen = {}
    for file in sorted(found, key=lambda file: len(file.parts)):
        try:
            content = json.loads(file.read_bytes())
            chosen[file.parent] = {name: float(rate) for name, rate in content.items()}
        except (ValueError, TypeError, AttributeError) as error:
            notes.append(f"{file}: not used, it does not map methods to rates ({error})")
    return chosen


def _read_config(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.parent}: left out, it has no {CONFIG}: method and rate are unknown")
    except ValueError as error:
        notes.append(f"{path}: run left out, cannot be read: {error}")
    return None


def _take_result(run: Run, line: dict[str, Any], notes: list[str]) -> None:
    """Take one line of results.jsonl; of two for a step, the later one."""
    try:
        found = EvaluationSet(str(line["set"]), str(line["role"]), str(line["kind"]))
        step, value = int(line["step"]), line["metrics"][found.metric.key]
        if found.role not in ROLES:
            raise KeyError(found.role)
        bounds = [value.get(name) for name in ("mean", "low", "high")]
        mean, low, high = (None if b is None else float(b) for b in bounds)
        if mean is None or (low is None) != (high is None):
            raise ValueError("mean")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        notes.append(
            f"{run.folder / RESULTS}: left out a result of set {line.get('set')!r} at step "
            f"{line.get('step')!r}, its form is unknown ({type(error).__name__}: {error})"
        )
        return
    known = run.sets.setdefault(found.name, found)
    if known != found:
        notes.append(
            f"{run.folder / RESULTS}: left out {found.name} as {found.role} {found.kind} at step "
            f"{step}, before it was {known.role} {known.kind}"
        )
        return
    run.values.setdefault(found.name, {})[step] = Estimate(mean, low, high)
    if isinstance(count := line.get("count"), int):
        run.counts[found.name] = count


def _take_metrics(run: Run, metrics: Sequence[dict[str, Any]]) -> None:
    """Add the evaluations that only metrics.jsonl has, without intervals, and the step's size."""
    sizes = []
    for line in metrics:
        step = line.get("step")
        for name, values in run.values.items():
            value = line.get(f"evaluation/{name}/{run.sets[name].metric.key}")
            if isinstance(value, int | float) and isinstance(step, int):
                values.setdefault(step, Estimate(float(value)))
        if isinstance(size := line.get("numbers_updated"), int | float):
            sizes.append(float(size))
    if sizes:
        run.numbers_per_step = math.fsum(sizes) / len(sizes)


def _note_gaps(run: Run, metrics: Sequence[dict[str, Any]], notes: list[str]) -> None:
    """Say what a run that is used lacks."""
    for name in run.values:
        if run.start(name) is None:
            notes.append(f"{run.folder}: {name} was not evaluated before the first step")
        if (end := run.end(name)) is None:
            notes.append(f"{run.folder}: {name} was not evaluated at the end, step {run.last_step}")
        elif not math.isfinite(end.mean):
            notes.append(f"{run.folder}: {name} is not finite at the end: the run has diverged")
    steps = [line["step"] for line in metrics if isinstance(line.get("step"), int)]
    if (trained := max(steps, default=0)) > run.last_step:
        notes.append(
            f"{run.folder}: evaluated at step {run.last_step} for the last time, trained to step "
            f"{trained}; its numbers are those of step {run.last_step}"
        )
