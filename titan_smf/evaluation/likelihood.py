"""How likely a model finds the end of a text, given its beginning."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from titan_smf.evaluation.evaluated_model import EvaluatedModel


@dataclass(frozen=True)
class Continuation:
    """A text whose tokens from `start` on are predicted, each given all before it."""

    tokens: list[int]
    start: int
    """From 1 to below the number of tokens."""

    @property
    def num_predicted(self) -> int:
        """The number of tokens whose likelihood counts."""
        return len(self.tokens) - self.start


def negative_log_likelihoods(
    model: EvaluatedModel, texts: Sequence[Continuation], batch_size: int, what: str = "texts"
) -> list[float] | None:
    """Return each text's negative log likelihood; None if asked to stop.

    In nats, summed over the predicted tokens. It does not depend on the other texts, nor on the
    number of ranks, but for rounding. Collective, inside `model.open()`.
    """

    def sums_of(batch: list[int]) -> list[float]:
        rows = [texts[item].tokens for item in batch] or [[model.tokenizer.pad_id] * 2]
        tokens = model.padded(rows)
        logits = model.logits(tokens[:, :-1])
        sums = []
        for row, item in enumerate(batch):  # one by one: a wide copy of all logits is large
            first, end = texts[item].start, len(texts[item].tokens)
            predicted = logits[row, first - 1 : end - 1]
            wide = torch.promote_types(predicted.dtype, torch.float32)
            sums.append(
                F.cross_entropy(predicted.to(wide), tokens[row, first:end], reduction="sum")
            )
        return torch.stack(sums).tolist() if sums else []

    lengths = [len(text.tokens) for text in texts]
    return model.map_batches(sums_of, lengths, batch_size, f"evaluation of {what}")
