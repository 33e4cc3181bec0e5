"""The evaluations of a training run: before its first step, now and then, and after its last."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from titan_smf.config.job import JobConfig
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError
from titan_smf.evaluation.evaluate import evaluate
from titan_smf.evaluation.results import ResultsFile
from titan_smf.evaluation.rounds import EvaluatedModel
from titan_smf.evaluation.sets import KEY, open_sets
from titan_smf.model.llama import MemoryLlama

VALIDATION = "validation"
"""The name of the validation loss among a run's metrics."""


class TrainingEvaluation:
    """Asks a run's model about its sets at the steps that are due, about each set once a step.

    Args:
        precision: autocast as in training.
        stop: whether this process was asked to stop.

    Raises:
        ConfigError, DataError: a set that cannot be used.
    """

    def __init__(
        self,
        config: JobConfig,
        model: MemoryLlama,
        tokenizer: Tokenizer,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[Any]],
        stop: Callable[[], bool],
    ) -> None:
        policy = config.parallelism.fsdp_reshard_after_forward
        self.model = EvaluatedModel(model, tokenizer, device, precision, policy, stop)
        self.settings = config.evaluation
        self.last_step = config.training.steps
        self.results = ResultsFile(Path(config.job.dump_folder))
        self.sets = open_sets(
            config.evaluation,
            tokenizer,
            model.model_args.max_seq_len,
            config.evaluation.seq_len or config.training.seq_len,
            config.data.cache,
        )
        if config.validation.enable and any(each.name == VALIDATION for each in self.sets):
            allowed = f"another name: evaluation/{VALIDATION}/loss is that of data.validation"
            raise ConfigError(KEY, VALIDATION, allowed)

    def start(self, step: int) -> None:
        """Begin a run that goes on after `step`: drop results of later steps."""
        if self.sets:
            self.results.start(step)

    def run(self, step: int) -> tuple[dict[str, float], bool]:
        """Evaluate if the step is due, as far as that has not been done, and write the results.

        Returns:
            the means under their names among the run's metrics, and whether a stop request ended
            the evaluation before its end. Collective.
        """
        interval = self.settings.interval
        due = step in (0, self.last_step) or (interval > 0 and step % interval == 0)
        if not self.sets or not due:
            return {}, False
        done = self.results.sets_at(step)
        means: dict[str, float] = {}
        for each in self.sets:
            if each.name in done:
                continue
            results = evaluate(
                self.model, [each], self.settings.batch_size, self.settings.resamples
            )
            if not results:
                return means, True
            self.results.add(results[0], step, checkpoint=None)
            means |= results[0].means()
        return means, False
