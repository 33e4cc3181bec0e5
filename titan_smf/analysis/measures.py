"""Core sets of texts, and how well a selection of slots covers what the texts read.

    T tokens of a text, A accesses of a token (memory layers * heads * slots of a head)

Pure functions over slot ids as in `sparse/accesses.OwnedSlots`, on the CPU. A share of a token is
of its A accesses: heads of one layer that read the same slot count each for itself.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from titan_smf.evaluation.metrics import estimate
from titan_smf.sparse.ranking import Ranking

RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
MEASURES = ("recall", "weight", "auc")

NOWHERE = 2**31 - 1
"""The place of a slot that is not in an order."""


@dataclass(frozen=True)
class ReadText:
    """The tokens of a text that the model read, and the slots that they read."""

    tokens: list[int]
    slots: Tensor
    """(T, A) int64."""
    weights: Tensor
    """(T, A) float64: softmax weights, which sum to 1 over the slots of a head."""


def without_begin(text: ReadText, bos_id: int | None) -> ReadText:
    """Return the text without its begin token, if it has one."""
    start = int(text.tokens[:1] == [bos_id])
    return ReadText(text.tokens[start:], text.slots[start:], text.weights[start:])


def core_set(texts: Sequence[Tensor]) -> Tensor:
    """Return the slots that every text reads at least once, ascending.

    Args:
        texts: the slots of each text, any shape.
    """
    distinct = torch.cat([slots.unique() for slots in texts])
    ids, counts = distinct.unique(return_counts=True)
    return ids[counts == len(texts)]


def places(slots: Tensor, order: Tensor) -> Tensor:
    """Return the place of each slot in `order`, distinct ids, counted from 0.

    The slots among the first t of the order are those whose place is below t; `NOWHERE` never is.
    """
    if not len(order):
        return torch.full_like(slots, NOWHERE)
    ids, place = order.sort()
    found = torch.searchsorted(ids, slots).clamp(max=len(ids) - 1)
    return torch.where(ids[found] == slots, place[found], NOWHERE)


def reads_of(slots: Tensor, ids: Tensor) -> Tensor:
    """Return how many of each token's accesses read one of the slots `ids`, (T,)."""
    return (places(slots, ids) != NOWHERE).sum(1)


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """Return how often a positive token scores higher than another one, ties counted half.

    The area under the receiver operating characteristic: 0.5 by chance, 1 if the scores separate
    the two. None unless there are tokens of both kinds.

    Args:
        scores: (n,) integers from 0 on.
        positive: (n,) bool.
    """
    highest = int(scores.max()) if len(scores) else 0
    hits = scores[positive].bincount(minlength=highest + 1)
    others = scores[~positive].bincount(minlength=highest + 1)
    pairs = int(hits.sum()) * int(others.sum())
    if not pairs:
        return None
    twice_won = hits * (2 * (others.cumsum(0) - others) + others)
    return int(twice_won.sum()) / (2 * pairs)


def measures(
    order: Tensor,
    sizes: Sequence[int],
    core: Tensor,
    question: ReadText,
    slots: Tensor,
    is_entity: Tensor,
) -> dict[str, list[float | None]]:
    """Measure the first slots of an order, for each number of them.

    Args:
        order: slots, best first.
        core: the slots to find; recall is None where there are none.
        slots, is_entity: (T, A), and (T,) bool, of the texts' tokens.
    """
    of_core, of_question = places(core, order), places(question.slots, order)
    of_tokens = places(slots, order)
    whole = question.weights.sum()
    return {
        "recall": [int((of_core < t).sum()) / len(core) if len(core) else None for t in sizes],
        "weight": [float(question.weights[of_question < t].sum() / whole) for t in sizes],
        "auc": [auc((of_tokens < t).sum(1), is_entity) for t in sizes],
    }


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means over records and quantiles of the core set's size.

    A mean is `[mean, low, high]` with its 95% bootstrap interval, or None where no record has the
    number.
    """
    core, found = [r["core"] for r in results], [r["rankings"] for r in results]
    quantiles = np.quantile(core, [0, 0.1, 0.5, 0.9, 1]).tolist()
    return {
        "core": _mean(core),
        "core_quantiles": dict(zip(("min", "10%", "50%", "90%", "max"), quantiles, strict=True)),
        "touched": _mean([r["touched"] for r in results]),
        "core_weight": _mean([r["core_weight"] for r in results]),
        "core_auc": _mean([r["core_auc"] for r in results]),
        "core_common": _mean(
            [r["core_common"] / r["core"] if r["core"] else None for r in results]
        ),
        "rankings": {
            ranking: {
                measure: [
                    _mean(values)
                    for values in zip(*(r[ranking][measure] for r in found), strict=True)
                ]
                for measure in MEASURES
            }
            for ranking in RANKINGS
        },
    }


def _mean(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return list(dataclasses.astuple(estimate(known))) if known else None
