"""Evaluates a run's model: before its first step, at the steps that are due, and after its last."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan_smf.config.job import JobConfig
from titan_smf.errors import ConfigError
from titan_smf.evaluation.evaluated_model import EvaluatedModel
from titan_smf.evaluation.results import ResultsFile
from titan_smf.evaluation.sets import KEY, open_sets
from titan_smf.evaluation.tasks import Task

VALIDATION = "validation"
"""The name of the validation loss among a run's metrics."""


class Evaluator:
    """Evaluates a model on the sets of `[evaluation]` and writes the results.

    Raises:
        ConfigError, DataError: a set that cannot be used.
    """

    def __init__(self, config: JobConfig, model: EvaluatedModel) -> None:
        self.model = model
        self.settings = config.evaluation
        self.last_step = config.training.steps
        self.results = ResultsFile(Path(config.job.dump_folder))
        longest = model.model.model_args.max_seq_len
        text_seq_len = self.settings.seq_len or config.training.seq_len
        cache = config.data.cache
        self.tasks = open_sets(self.settings, model.tokenizer, longest, text_seq_len, cache)
        if config.validation.enable and any(task.name == VALIDATION for task in self.tasks):
            allowed = f"another name: evaluation/{VALIDATION}/loss is that of data.validation"
            raise ConfigError(KEY, VALIDATION, allowed)

    def start(self, step: int) -> None:
        """Begin a run that goes on after `step`: drop results of later steps."""
        if self.tasks:
            self.results.start(step)

    def run(self, step: int) -> tuple[dict[str, float], bool]:
        """Evaluate the sets that have no result yet at this step, if it is due. Collective.

        Returns:
            the means by their names in metrics.jsonl, and whether a stop request ended the
            evaluation early.
        """
        interval = self.settings.interval
        due = step in (0, self.last_step) or (interval > 0 and step % interval == 0)
        if not self.tasks or not due:
            return {}, False
        done = self.results.sets_at(step)
        means: dict[str, float] = {}
        for task in self.tasks:
            if task.name not in done:
                result = self.evaluate(task, step)
                if result is None:
                    return means, True
                means |= {
                    f"evaluation/{task.name}/{metric}": value["mean"]
                    for metric, value in result["metrics"].items()
                }
        return means, False

    def evaluate(
        self, task: Task, step: int, checkpoint: str | None = None
    ) -> dict[str, Any] | None:
        """Evaluate one set and write its result; None if asked to stop. Collective.

        Args:
            checkpoint: where the weights are from; None for those of the run itself after `step`.

        Returns:
            the line of `results.jsonl`, the same on every rank but for the seconds.
        """
        with self.model.open():
            begin = time.perf_counter()
            scores = task.score(self.model, self.settings.batch_size, self.settings.resamples)
            seconds = time.perf_counter() - begin
        if scores is None:
            return None
        metrics, predictions = scores
        result = {
            "set": task.name,
            "role": task.given.role,
            "kind": task.given.kind,
            "step": step,
            "checkpoint": checkpoint,
            "count": task.count,
            "metrics": {name: asdict(value) for name, value in metrics.items()},
            "settings": task.settings,
            "seconds": round(seconds, 3),
        }
        self.results.add(result, predictions)
        return result
