"""How often each memory slot was read, and how evenly.

    M accesses, N slots of a table, R rows here, U distinct slots touched here

Every rank counts the rows it owns; the lookups of its shard group bring it all accesses to them
(`ValueTable.forward`). Replicas hold the same rows and see other tokens: their counts are summed.

Dense counts (`count_accesses`) are for figures of a step. What is done in every step uses the
touched slots alone (`TouchedSlots`), at a cost that does not depend on N.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.model.value_table import ValueTable


def count_accesses(accesses: Tensor, counts: Tensor) -> None:
    """Add 1 to `counts` (R,) int64 for each time a row is in `accesses`, any shape, int32 or int64.

    Add those of a lookup once: activation checkpointing runs its forward pass twice.
    """
    rows = accesses.flatten().long()
    counts.scatter_add_(0, rows, torch.ones_like(rows))


@dataclass(frozen=True)
class OwnedSlots:
    """The slots of one rank: the rows `start <= row < stop` of each table.

    Slot ids are global, `table * N + row`, and below 2**31. An array over the slots of this rank,
    (tables * R,), holds the rows of the first table, then those of the second ...
    """

    num_slots: int
    """N, of one table."""
    start: int
    stop: int
    num_tables: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.num_slots
        assert self.num_tables * self.num_slots < 2**31, "a slot id must fit into 31 bits"

    @classmethod
    def of(cls, tables: Iterable[ValueTable]) -> "OwnedSlots":
        """Return the slots of a model's tables whose rows this rank holds."""
        first, *others = tables
        return cls(first.num_slots, *first.row_range, 1 + len(others))

    def __len__(self) -> int:
        return self.num_tables * (self.stop - self.start)

    def ids(self, accesses: Tensor, table: int = 0) -> Tensor:
        """Return the slot ids of what `ValueTable.forward` returns, rows counted from `start`."""
        return accesses + (table * self.num_slots + self.start)

    def ids_by_layer(self, accesses: Sequence[Tensor]) -> list[Tensor]:
        """Return the slot ids of the accesses of each memory layer, which may share a table."""
        return [self.ids(rows, layer % self.num_tables) for layer, rows in enumerate(accesses)]

    def positions(self, ids: Tensor) -> Tensor:
        """Return where slots of this rank are in an array over the slots of this rank."""
        table = ids // self.num_slots
        return table * (self.stop - self.start) + ids - table * self.num_slots - self.start


@dataclass(frozen=True)
class TouchedSlots:
    """Distinct slots of one rank that were accessed, and how often."""

    ids: Tensor
    """(U,) int64, ascending."""
    counts: Tensor
    """(U,) int64, 1 or more."""


def touched_slots(accesses: Sequence[Tensor]) -> TouchedSlots:
    """Count slot ids, given as one or more tensors (of micro-batches, layers) of one rank.

    Takes the time of sorting the M ids, and no memory for slots that do not occur.
    """
    ids = torch.cat([part.flatten().to(torch.int32) for part in accesses])
    on_cpu = ids.device.type == "cpu"  # where numpy sorts 4 times as fast as torch
    ids = torch.from_numpy(np.sort(ids.numpy())) if on_cpu else ids.sort().values
    distinct, counts = torch.unique_consecutive(ids, return_counts=True)
    return TouchedSlots(distinct.long(), counts)


def sum_over_replicas(
    touched: TouchedSlots, replicate_group: dist.ProcessGroup | None
) -> TouchedSlots:
    """Return the touched slots of all replicas of these rows; the same on each of them.

    Every replica receives 8 bytes per slot that another touched, filled up to the longest list.
    """
    if replicate_group is None:
        return touched
    num_ids = len(touched.ids)
    sizes = all_gather(touched.ids.new_tensor(num_ids), replicate_group).tolist()
    mine = touched.ids.new_zeros(max(sizes))
    mine[:num_ids] = (touched.ids << 32) | touched.counts  # counts of a step fit into 32 bits
    lists = all_gather(mine, replicate_group)
    pairs = torch.cat([part[:size] for part, size in zip(lists, sizes, strict=True)])
    ids, place = torch.unique(pairs >> 32, return_inverse=True)
    counts = torch.zeros_like(ids).index_add_(0, place, pairs & 0xFFFFFFFF)
    return TouchedSlots(ids, counts)


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the tensors of all ranks of a group, of one shape, along a new first dimension."""
    if group is None:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(gathered.unbind()), tensor, group=group)
    return gathered


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over the ranks of a group; the tensor itself without one."""
    if group is None:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def slots_used_fraction(
    counts: Tensor,
    shard_group: dist.ProcessGroup | None = None,
    replicate_group: dist.ProcessGroup | None = None,
) -> float:
    """Return the fraction of all N slots with at least one access; the same on every rank.

    Args:
        counts: (R,) of this rank.
        shard_group: the ranks that hold the other rows; None if all rows are here.
        replicate_group: the ranks that hold the same rows; None if no other does.
    """
    counts = all_reduce(counts, replicate_group)
    sums = torch.stack([(counts > 0).sum(), torch.tensor(len(counts), device=counts.device)])
    used, num_slots = all_reduce(sums, shard_group).tolist()
    return used / num_slots


def usage_kl(
    counts: Tensor,
    shard_group: dist.ProcessGroup | None = None,
    replicate_group: dist.ProcessGroup | None = None,
) -> float:
    """Return `sum_i p_i log(p_i N)`, `p_i` the share of slot i: how far from even, in nats.

    0 where all slots are read equally often, log N where only one is; 0 without accesses. The
    arguments are those of `slots_used_fraction`.
    """
    c = all_reduce(counts, replicate_group).double()
    sums = torch.stack([c.sum(), torch.xlogy(c, c).sum(), c.new_tensor(len(c))])
    total, c_log_c, num_slots = all_reduce(sums, shard_group).tolist()
    if total == 0:
        return 0.0
    return c_log_c / total - math.log(total) + math.log(num_slots)
