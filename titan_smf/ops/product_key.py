"""Product-key search: the k best of n_keys**2 slots from 2 * n_keys scores (arXiv 1907.05242).

    T tokens, H heads, N = n_keys**2 slots, P candidate pairs

Slot `(i, j)` has id `i * n_keys + j` and score `query_1 . keys_1[i] + query_2 . keys_2[j]`. The
search never scores all N slots:

1. The k best half-keys of each half. A slot outside them is beaten by k slots inside.
2. The k best of their pairs. In the order of rank, pair `(a, b)` is beaten by all `(a', b')` with
   `a' <= a, b' <= b`: only pairs with `(a + 1) * (b + 1) <= k` can be among the k best. These are
   P = 119 instead of 1024 at k = 32.
"""

import torch
from torch import Tensor

GROUP = 4
"""Half-keys per group of the first stage on the CPU; 4 was the fastest of 2, 4, 8, 16."""

BLOCK_SCORES = 1 << 22
"""Half-key scores made at a time on the CPU. Fresh memory is slow: all 8M scores of 1024 tokens,
4 heads and 1024 keys in one piece cost a third more time than in two."""


def product_key_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the exact k best slots of each head, in no particular order: `(scores, slots)`.

    The scores are differentiable with respect to the query and the keys. Equal scores: any of the
    tied slots may be returned, the same ones whenever a row of scores is the same.

    Args:
        query: (T, H, k_dim), the halves one after the other.
        keys: (2, H, n_keys, k_dim // 2), of the query's dtype.
        k: slots per head, at most n_keys.

    Returns:
        scores (T, H, k), at least float32 (the halves are added in it), and slots (T, H, k), int64.
    """
    if query.device.type != "cpu":
        return _search(query, keys, k)
    tokens_per_block = max(1, BLOCK_SCORES // keys.shape[:3].numel())
    blocks = [_search(block, keys, k) for block in query.split(tokens_per_block)]
    if len(blocks) == 1:
        return blocks[0]
    scores, slots = zip(*blocks, strict=True)
    return torch.cat(scores), torch.cat(slots)


def _search(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    T, H, k_dim = query.shape
    n_keys = keys.shape[2]
    query_2HTd = query.view(T, H, 2, k_dim // 2).permute(2, 1, 0, 3)
    scores_2HTn = torch.matmul(query_2HTd, keys.transpose(2, 3))
    with torch.no_grad():
        half_scores, half_slots = _largest(scores_2HTn, k)
        slots_2HTk = half_slots.gather(-1, best_pairs(half_scores))
    dtype = torch.promote_types(scores_2HTn.dtype, torch.float32)
    scores_HTk = scores_2HTn.gather(-1, slots_2HTk).sum(0, dtype=dtype)
    slots_HTk = slots_2HTk[0] * n_keys + slots_2HTk[1]
    return scores_HTk.transpose(0, 1), slots_HTk.transpose(0, 1)


def best_pairs(half_scores: Tensor) -> Tensor:
    """Return the ranks `(a, b)` of the k largest sums `half_scores[0, a] + half_scores[1, b]`.

    Args:
        half_scores: (2, ..., k), each in descending order; added in at least float32.

    Returns:
        (2, ..., k) int64: all a, then all b.
    """
    k = half_scores.shape[-1]
    ranks_2P = _candidate_ranks(k, half_scores.device)
    rows_2Rk = half_scores.flatten(1, -2)
    ranks_2RP = ranks_2P.unsqueeze(1).expand(2, rows_2Rk.shape[1], -1)
    sums = rows_2Rk[0].gather(-1, ranks_2RP[0])
    sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
    sums += rows_2Rk[1].gather(-1, ranks_2RP[1])
    best = sums.topk(k, dim=-1, sorted=False).indices
    return ranks_2P[:, best].view(half_scores.shape)


def _candidate_ranks(k: int, device: torch.device) -> Tensor:
    """Return the P pairs of ranks with `(a + 1) * (b + 1) <= k`, (2, P), on the device.

    k = 3 gives [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]].
    """
    rank = torch.arange(k, device=device)
    partners = k // (rank + 1)
    P = sum(k // (a + 1) for a in range(k))
    first = rank.repeat_interleave(partners, output_size=P)
    start = partners.cumsum(0) - partners
    return torch.stack([first, torch.arange(P, device=device) - start[first]])


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `scores.topk(k)` over the last dimension, in descending order.

    On a CPU, topk costs 8 ns an element and thread, a maximum over groups almost nothing. The k
    largest lie in the k groups with the largest maxima, so search the maxima, then those groups:
    0.6 of the time at 1024 keys and k = 32.
    """
    n = scores.shape[-1]
    if scores.device.type != "cpu" or n % GROUP or n < 8 * k:
        return scores.topk(k, dim=-1)
    num_groups = n // GROUP  # group g holds g, g + num_groups, g + 2 * num_groups, ...
    maxima = scores.unflatten(-1, (GROUP, num_groups)).amax(-2)
    groups = maxima.topk(k, dim=-1, sorted=False).indices
    members = torch.arange(0, n, num_groups, device=scores.device)
    candidates = (groups.unsqueeze(-2) + members.unsqueeze(-1)).flatten(-2)
    values, positions = scores.gather(-1, candidates).topk(k, dim=-1)
    return values, candidates.gather(-1, positions)
