"""Finished runs: the folders that hold one, and what their files say.

A run is a folder with `config.toml`, `metrics.jsonl` or `results.jsonl`. What cannot be read is
left out and named in `notes`, one sentence each.
"""

import json
import math
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_smf.analysis.access_report import ANALYSIS_FILE
from titan_smf.errors import UserError
from titan_smf.report.estimates import Estimate, mean_of

CONFIG, METRICS, RESULTS, CHOSEN = "config.toml", "metrics.jsonl", "results.jsonl", "chosen.json"
NO_DESCRIPTION = ("", "default job")  # the second one is torchtitan's default


@dataclass(frozen=True)
class Metric:
    """What a kind of evaluation set is measured by."""

    key: str
    """In results.jsonl."""
    label: str
    is_score: bool
    """Whether it is a score between 0 and 1, the higher the better; otherwise a loss."""


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
    def is_score(self) -> bool:
        return self.metric.is_score

    @property
    def label(self) -> str:
        return f"{self.name} {self.metric.label}"

    @property
    def change(self) -> str:
        """What `Run.forgotten` measures."""
        return "lost" if self.is_score else "rise"

    @property
    def forgetting_label(self) -> str:
        return f"{self.label} {self.change}"


@dataclass
class Run:
    """One training run and its evaluations."""

    folder: Path
    method: str
    """`job.description`; without one, the folder's name."""
    kind: str
    """`finetune.method`."""
    seed: int | None
    """`debug.seed`; None if the run had none."""
    rate: float
    """The learning rate of what this run trains: `memory.value_lr` or `optimizer.lr`."""
    other_rate: float
    """The other one of the two."""
    chosen_rate: float | None
    """The method's rate in chosen.json."""
    idf_path: str
    """`selection.idf_path`."""
    values: dict[EvaluationSet, dict[int, Estimate]] = field(default_factory=dict)
    """The metric of each set by step; no two sets have one name."""
    counts: dict[str, int] = field(default_factory=dict)
    """Items of each set."""
    parameters_per_step: float | None = None
    """Trainable parameters that a step changes, averaged over the steps."""

    @property
    def is_chosen(self) -> bool:
        """Whether this run has the rate that was chosen for its method."""
        return self.chosen_rate is not None and math.isclose(
            self.chosen_rate, self.rate, rel_tol=1e-6
        )

    @property
    def last_step(self) -> int:
        """The last step with an evaluation."""
        return max(step for values in self.values.values() for step in values)

    @property
    def target(self) -> EvaluationSet | None:
        """The set that says how much was learned: the first one with the role, questions first."""
        targets = [s for s in self.values if s.role == "target" and s.is_score]
        return min(targets, key=lambda s: s.kind != "questions", default=None)

    def start(self, evaluated: EvaluationSet) -> Estimate | None:
        """Return a set's metric before the first step."""
        return self.values.get(evaluated, {}).get(0)

    def end(self, evaluated: EvaluationSet) -> Estimate | None:
        """Return a set's metric after the last step."""
        return self.values.get(evaluated, {}).get(self.last_step)

    def forgotten(self, evaluated: EvaluationSet) -> Estimate | None:
        """Return how much worse a set became: the score lost, or the rise of a loss."""
        start, end = self.start(evaluated), self.end(evaluated)
        if start is None or end is None:
            return None
        return start.minus(end) if evaluated.is_score else end.minus(start)

    def forgotten_share(self, evaluated: EvaluationSet) -> float | None:
        """Return the share of the metric before training that was forgotten; None if it was 0."""
        start, forgotten = self.start(evaluated), self.forgotten(evaluated)
        return forgotten.mean / start.mean if forgotten and start and start.mean else None


def find_runs(paths: Sequence[Path], notes: list[str]) -> list[Run]:
    """Return the runs with evaluations in folders and below them, by path, each once.

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
            if folder.resolve() not in runs and (run := _read_run(folder, chosen, notes)):
                runs[folder.resolve()] = run
    if not runs and not analyses_below(paths):
        found = "\n  ".join(dict.fromkeys(notes))
        raise UserError(
            f"nothing to report, no run has evaluations after its training:\n  {found}\n"
            "train with evaluation.sets, or run tools/evaluate.py"
        )
    return [runs[folder] for folder in sorted(runs)]


def analyses_below(paths: Sequence[Path]) -> list[Path]:
    """Return the files of access analyses in folders and below them."""
    return [file for path in paths for file in path.rglob(ANALYSIS_FILE)]


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a jsonl file; unlike `storage.read_lines`, reads on after a torn line
    and names each."""
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
    """The folders that look like a run, sorted, without those that runs keep in their own."""
    for folder, below, files in os.walk(path):
        below[:] = sorted(n for n in below if n not in ("checkpoints", "tb") and n[0] != ".")
        if {CONFIG, METRICS, RESULTS} & set(files):
            yield Path(folder)


def _chosen_rates(path: Path, notes: list[str]) -> dict[Path, dict[str, float]]:
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


def _read_run(folder: Path, chosen: dict[Path, dict[str, float]], notes: list[str]) -> Run | None:
    """A run with evaluations before and after training; None, and a note, if it has none.

    Args:
        chosen: the content of chosen.json by the folder that it lies in, the outermost first.
    """
    try:
        config = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{folder}: left out, it has no {CONFIG}: method and rate are unknown")
        return None
    except ValueError as error:
        notes.append(f"{folder / CONFIG}: run left out, cannot be read: {error}")
        return None
    if not (folder / RESULTS).is_file():
        notes.append(f"{folder}: left out, it has no {RESULTS}: not evaluated")
        return None
    run = _run_of(folder, config, chosen)
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
    steps = config.get("training", {}).get("steps", 0) if own else 0
    if reason := _reason_to_leave_out(run, steps):
        notes.append(f"{folder}: left out, {reason}")
        return None
    _note_gaps(run, metrics, notes)
    return run


def _run_of(folder: Path, config: dict[str, Any], chosen: dict[Path, dict[str, float]]) -> Run:
    """A run as its configuration describes it."""

    def setting(section: str, name: str, default: Any) -> Any:
        return config.get(section, {}).get(name, default)

    description = str(setting("job", "description", ""))
    method = folder.name if description in NO_DESCRIPTION else description
    kind = str(setting("finetune", "method", "full"))
    rate = float(setting("optimizer", "lr", math.nan))
    other_rate = float(setting("memory", "value_lr", math.nan))
    if kind in ("sparse_memory", "values"):
        rate, other_rate = other_rate, rate
    chosen_rate = None
    for root, content in chosen.items():
        if folder.resolve().is_relative_to(root):
            chosen_rate = content.get(method, chosen_rate)
    seed, idf_path = setting("debug", "seed", None), str(setting("selection", "idf_path", ""))
    return Run(folder, method, kind, seed, rate, other_rate, chosen_rate, idf_path)


def _reason_to_leave_out(run: Run, steps: int) -> str | None:
    """Why a run cannot be compared; None if it can."""
    if math.isnan(run.rate):
        return f"{CONFIG} names no learning rate"
    if not run.values:
        return f"{RESULTS} holds no evaluation"
    if run.last_step < steps:
        return f"it has come to step {run.last_step} of {steps}"
    if run.last_step == 0:
        return "evaluated before the first step only"
    if run.target is None:
        return "no target set of questions or choices was evaluated"
    if run.end(run.target) is None:
        return f"{run.target.name} was not evaluated at the end, {run.last_step}"
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
    known = next((other for other in run.values if other.name == found.name), found)
    if known != found:
        notes.append(
            f"{run.folder / RESULTS}: left out {found.name} as {found.role} {found.kind} at step "
            f"{step}, before it was {known.role} {known.kind}"
        )
        return
    run.values.setdefault(found, {})[step] = Estimate(mean, low, high)
    if isinstance(count := line.get("count"), int):
        run.counts[found.name] = count


def _take_metrics(run: Run, metrics: Sequence[dict[str, Any]]) -> None:
    """Add the evaluations that only metrics.jsonl has, without intervals, and the step's size."""
    for line in metrics:
        step = line.get("step")
        for evaluated, values in run.values.items():
            value = line.get(f"evaluation/{evaluated.name}/{evaluated.metric.key}")
            if isinstance(value, int | float) and isinstance(step, int):
                values.setdefault(step, Estimate(float(value)))
    sizes = [line.get("numbers_updated") for line in metrics]
    run.parameters_per_step = mean_of(s if isinstance(s, int | float) else None for s in sizes)


def _note_gaps(run: Run, metrics: Sequence[dict[str, Any]], notes: list[str]) -> None:
    """Say what a run that is used lacks."""
    for evaluated in run.values:
        named = f"{run.folder}: {evaluated.name}"
        if run.start(evaluated) is None:
            notes.append(f"{named} was not evaluated before the first step")
        if (end := run.end(evaluated)) is None:
            notes.append(f"{named} was not evaluated at the end, step {run.last_step}")
        elif not math.isfinite(end.mean):
            notes.append(f"{named} is not finite at the end: the run has diverged")
    steps = [line["step"] for line in metrics if isinstance(line.get("step"), int)]
    if (trained := max(steps, default=0)) > run.last_step:
        notes.append(
            f"{run.folder}: evaluated at step {run.last_step} for the last time, trained to step "
            f"{trained}; its numbers are those of step {run.last_step}"
        )
