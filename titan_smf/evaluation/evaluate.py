"""Ask a model on all ranks about sets, any number of times in one process.

sets = open_sets(config.evaluation, tokenizer, ...)       once
results = evaluate(model, sets, batch_size, resamples)    as often as wanted
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from titan_smf.evaluation.metrics import Estimate
from titan_smf.evaluation.rounds import EvaluatedModel
from titan_smf.evaluation.sets import OpenSet


@dataclass(frozen=True)
class SetResult:
    """What a model made of one set; the same on every rank but for the seconds."""

    name: str
    role: str
    kind: str
    count: int
    """Number of items."""
    metrics: dict[str, Estimate]
    settings: dict[str, Any]
    """What the numbers depend on beside the model."""
    predictions: list[dict[str, Any]]
    """An object for each item, to be read by a person; none for text."""
    seconds: float

    def line(self, step: int, checkpoint: str | None) -> dict[str, Any]:
        """The object that stands for it in `results.jsonl`.

        Without a checkpoint the weights were those of the run itself after `step`.
        """
        return {
            "set": self.name,
            "role": self.role,
            "kind": self.kind,
            "step": step,
            "checkpoint": checkpoint,
            "count": self.count,
            "metrics": {name: asdict(value) for name, value in self.metrics.items()},
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
        }

    def means(self) -> dict[str, float]:
        """The means under their names among a run's metrics."""
        return {f"evaluation/{self.name}/{name}": v.mean for name, v in self.metrics.items()}


def evaluate(
    model: EvaluatedModel, sets: Sequence[OpenSet], batch_size: int, resamples: int
) -> list[SetResult]:
    """The results of the sets, in their order; of those before a stop request only. Collective.

    Args:
        batch_size: items that a rank works on at once, at most.
        resamples: of the bootstrap.
    """
    results: list[SetResult] = []
    with model.open():
        for each in sets:
            begin = time.perf_counter()
            outcome = each.task.run(model, batch_size, resamples, each.name)
            if outcome is None:
                break
            results.append(
                SetResult(
                    each.name,
                    each.given.role,
                    each.given.kind,
                    each.task.count,
                    outcome.metrics,
                    {"path": each.given.path, **each.task.settings},
                    outcome.predictions,
                    time.perf_counter() - begin,
                )
            )
    return results
