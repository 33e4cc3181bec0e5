"""What one text reads at each token, and what sets of slots have to do with it.

    T tokens of a text, A accesses of a token (memory layers * heads * slots of a head)

Pure functions over slot ids as `sparse/accesses.OwnedSlots` has them, on the CPU. A share of a
token is of its A accesses: heads of one layer that read the same slot count each for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """Returns the text without its begin token, if it has one."""
    start = int(text.tokens[:1] == [bos_id])
    return ReadText(text.tokens[start:], text.slots[start:], text.weights[start:])


def core_set(texts: Sequence[Tensor]) -> Tensor:
    """Returns the slots that every text reads at least once, ascending.

    Args:
        texts: the slots of each text, any shape.
    """
    distinct = torch.cat([slots.unique() for slots in texts])
    ids, counts = distinct.unique(return_counts=True)
    return ids[counts == len(texts)]


def places(slots: Tensor, order: Tensor) -> Tensor:
    """Returns at which place of `order`, distinct ids, each of the slots stands, from 0 on.

    The slots among the first t of the order are those whose place is below t; `NOWHERE` never is.
    """
    if not len(order):
        return torch.full_like(slots, NOWHERE)
    ids, place = order.sort()
    found = torch.searchsorted(ids, slots).clamp(max=len(ids) - 1)
    return torch.where(ids[found] == slots, place[found], NOWHERE)


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """Returns how often a positive token has a higher score than another one, ties counted half.

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
