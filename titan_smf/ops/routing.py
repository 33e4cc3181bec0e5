"""Routing of lookups to the ranks that hold the slots, and of the results back.

    T tokens, K slots per token, V value dim, W ranks; seen from one rank:
    M = T * K entries (token, slot, weight) of its own, P partial sums that come back to it
    (pairs of one of its tokens and an owner of at least one of the token's slots)

                       entries: row, weight, number per (token, owner)
        tokens' rank  ------------------------------------------------->  owner
        (T, K)        <-------------------------------------------------  (bags of rows)
                       one partial sum (V) per (token, owner)

The gradient takes the same way: gradients of outputs go to the owners, those of weights return.
Sizes are exchanged first; reading them is the only time the host waits for the device.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

INDEX_BYTES = 4
"""Of a local row id in an exchange."""

SIZES_BYTES = 4 * 8
"""Of the four numbers by which two ranks agree on the sizes of what follows."""


class RankExchange:
    """Exchanges tensors among the ranks of one group and counts the bytes that arrive."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.bytes_received = 0

    def all_to_all(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Return what all ranks sent to this one, in rank order, (sum(received), ...).

        `tensor` (sum(sent), ...) holds what goes to rank 0, then what goes to rank 1 ...; its own
        part is copied without touching the network. Travels as bytes: gloo knows few dtypes.
        """
        output = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(
            output.unsqueeze(-1).view(torch.uint8),
            tensor.contiguous().unsqueeze(-1).view(torch.uint8),
            output_split_sizes=received,
            input_split_sizes=sent,
            group=self.group,
        )
        entry_bytes = output.element_size() * output.shape[1:].numel()
        self.bytes_received += (sum(received) - received[self.rank]) * entry_bytes
        return output


@dataclass(frozen=True)
class Splits:
    """How many entries and partial sums go to, or come from, each rank of an exchange."""

    exchange: RankExchange
    entries_sent: list[int]
    entries_received: list[int]
    partials_sent: list[int]
    partials_received: list[int]


@dataclass(frozen=True)
class Route:
    """What a rank keeps of a routed lookup, as the sender of entries and as an owner of rows."""

    order: Tensor
    """(T*K,) its own entries sorted by owner."""
    token: Tensor
    """(P,) the token of each partial sum that comes back to it."""
    rows: Tensor
    """(entries received,) int32: the local row that each entry asks this owner for."""
    weights: Tensor
    """(entries received,) their weights."""
    offsets: Tensor
    """(partial sums to send,) int32: the first entry of each."""
    accesses: Tensor
    """Local rows asked for by tokens that count."""
    splits: Splits


def rows_per_rank(num_slots: int, world_size: int) -> int:
    """Return how many rows each rank holds, save the last ones that may hold fewer or none: the
    split of `torch.chunk` and of DTensor's `Shard(0)`."""
    return -(-num_slots // world_size)


def route_entries(
    exchange: RankExchange, slots: Tensor, weights: Tensor, counted: Tensor | None, num_slots: int
) -> Route:
    """Send each entry to the owner of its slot. All ranks of the group call it together.

    Args:
        slots, weights: (T, K); T may differ among the ranks and be 0, K may not differ.
        counted: (T,) bool, tokens that appear in the owners' `accesses`; None for all.
    """
    T, K = slots.shape
    W = exchange.world_size
    block = rows_per_rank(num_slots, W)

    # 1. Sort the entries by owner; within an owner they stay in the order of tokens.
    owner_TK = slots // block
    row_TK = (slots - owner_TK * block).to(torch.int32)
    if counted is not None:  # an uncounted row travels as its complement, below zero
        row_TK = torch.where(counted.unsqueeze(1), row_TK, ~row_TK)
    order = owner_TK.flatten().to(torch.int32).sort(stable=True).indices
    token_T = torch.arange(T, device=slots.device)
    pair = (owner_TK * T + token_T.unsqueeze(1)).flatten()
    counts_WT = slots.new_zeros(W * T).scatter_add_(0, pair, torch.ones_like(pair)).view(W, T)

    # 2. Agree on sizes: per pair of ranks entries, tokens, partial sums, entries that count.
    present_WT = counts_WT > 0
    counting_WT = counts_WT if counted is None else counts_WT * counted
    entries_W = counts_WT.sum(1)
    tokens_W = torch.full_like(entries_W, T)
    sizes = torch.stack([entries_W, tokens_W, present_WT.sum(1), counting_WT.sum(1)], dim=1)
    each = [1] * W
    sizes_received = exchange.all_to_all(sizes, each, each)
    sent, received = torch.stack([sizes, sizes_received]).transpose(1, 2).tolist()
    splits = Splits(exchange, sent[0], received[0], received[2], sent[2])

    # 3. Send rows, weights, and how many entries each token has at the owner: its bag sizes.
    rows = exchange.all_to_all(row_TK.flatten()[order], sent[0], received[0])
    weights = exchange.all_to_all(weights.flatten()[order], sent[0], received[0])
    count_dtype = torch.uint8 if K <= 255 else torch.int16
    counts = exchange.all_to_all(counts_WT.flatten().to(count_dtype), sent[1], received[1])

    # 4. As an owner: entries that count, and the bags. Sizes are known, so the host need not wait.
    num_counted = sum(received[3])
    accesses = rows
    if num_counted < rows.shape[0]:
        accesses = rows[torch.nonzero_static(rows >= 0, size=num_counted).squeeze(1)]
        rows = torch.where(rows >= 0, rows, ~rows)
    bags = torch.nonzero_static(counts, size=sum(received[2])).squeeze(1)
    bag_sizes = counts[bags].to(torch.int32)
    offsets = bag_sizes.cumsum(0, dtype=torch.int32) - bag_sizes

    partials = torch.nonzero_static(present_WT.flatten(), size=sum(sent[2])).squeeze(1)
    return Route(order, partials % max(T, 1), rows, weights, offsets, accesses, splits)


def send_rows(
    exchange: RankExchange, slots: Tensor, counted: Tensor | None, num_slots: int
) -> Tensor:
    """Return the `accesses` of `route_entries`, in its order, where nothing else is of use.

    Only the slots of tokens that count travel: see `count_bytes`.
    """
    W = exchange.world_size
    block = rows_per_rank(num_slots, W)
    owner = (slots // block).to(torch.int32)
    if counted is not None:  # slots of other tokens sort behind those of the last rank
        owner.masked_fill_(~counted.unsqueeze(1), W)
    owner, order = owner.flatten().sort(stable=True)
    ends = torch.searchsorted(owner, torch.arange(W, device=owner.device), right=True)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    each = [1] * W
    sent, received = torch.stack([sizes, exchange.all_to_all(sizes, each, each)]).tolist()
    rows = (slots.flatten()[order[: sum(sent)]] % block).to(torch.int32)
    return exchange.all_to_all(rows, sent, received)


def add_partials(splits: Splits, token: Tensor, partials: Tensor, T: int) -> Tensor:
    """Send the owners' partial sums home and return their sums in rank order, (T, V)."""
    partials = splits.exchange.all_to_all(partials, splits.partials_sent, splits.partials_received)
    if partials.shape[0] == 0:
        return partials.new_zeros(T, partials.shape[1])
    order = token.sort(stable=True).indices  # by token, then by rank of the owner
    counts = token.new_zeros(T).scatter_add_(0, token, torch.ones_like(token))
    return F.embedding_bag(order, partials, counts.cumsum(0) - counts, mode="sum")


def send_output_gradient(splits: Splits, token: Tensor, gradient: Tensor) -> Tensor:
    """Send each output gradient (T, V) to the owners of its partial sums: one row per bag."""
    sent, received = splits.partials_received, splits.partials_sent
    return splits.exchange.all_to_all(gradient[token], sent, received)


def return_weight_gradient(splits: Splits, order: Tensor, gradient: Tensor) -> Tensor:
    """Send the owners' gradients of the weights home, (T*K,) in the order of the entries."""
    gradient = splits.exchange.all_to_all(gradient, splits.entries_received, splits.entries_sent)
    return torch.empty_like(gradient).index_copy_(0, order, gradient)


def lookup_bytes(
    tokens: int, slots_per_token: int, v_dim: int, world_size: int, activation_bytes: int
) -> tuple[float, float, float]:
    """Return the bytes one of W ranks receives from the others in a lookup: forward, backward to
    the owners, and back to the weights if these need a gradient.

    For slots spread evenly over the ranks, T tokens on each, and weights, partial sums and
    gradients of b bytes a number:

        forward:   r T K (4 + b)  +  (W - 1) T c  +  (W - 1) f T V b  +  sizes
                   rows, weights     bag sizes       partial sums
        backward:  (W - 1) f T V b   +  r T K b
                   of outputs           of weights

    r = (W - 1) / W is the share of entries from other ranks; c = 1 byte (2 if K > 255);
    f = 1 - (1 - 1/W)**K is the chance that a token needs a given owner.
    """
    T, K, W, b = tokens, slots_per_token, world_size, activation_bytes
    others = W - 1
    entries = others / W * T * K
    partials = others * (1 - (1 - 1 / W) ** K) * T
    bag_sizes = others * T * (1 if K <= 255 else 2)
    forward = entries * (INDEX_BYTES + b) + bag_sizes + partials * v_dim * b + others * SIZES_BYTES
    return forward, partials * v_dim * b, entries * b


def count_bytes(tokens: int, slots_per_token: int, world_size: int) -> float:
    """Return the bytes one of W ranks receives where accesses of T tokens on each are counted
    without a lookup: `r T K 4 + (W - 1) 8`, r = (W - 1) / W."""
    T, K, W = tokens, slots_per_token, world_size
    return (W - 1) / W * T * K * INDEX_BYTES + (W - 1) * 8
