"""How often each memory slot was read, and how evenly.

    R rows here, N slots

Every rank counts the rows it owns; the lookups of its shard group bring it all accesses to them
(`ValueTable.forward`). Replicas hold the same rows and see other tokens: their counts are summed.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor


class AccessCounter:
    """Counts accesses to this rank's rows.

    Add the accesses of a lookup once: activation checkpointing runs its forward pass twice.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """(R,), since the last reset."""

    def add(self, accesses: Tensor) -> None:
        """Adds 1 to a row for each time its id occurs in `accesses`, any shape, int32 or int64."""
        rows = accesses.flatten().long()
        self.counts.scatter_add_(0, rows, torch.ones_like(rows))

    def reset(self) -> None:
        """Sets all counts to zero."""
        self.counts.zero_()


def slots_used_fraction(
    counts: Tensor,
    shard_group: dist.ProcessGroup | None = None,
    replicate_group: dist.ProcessGroup | None = None,
) -> float:
    """Returns the fraction of all N slots with at least one access; the same on every rank.

    Args:
        counts: (R,) of this rank.
        shard_group: the ranks that hold the other rows; None if all rows are here.
        replicate_group: the ranks that hold the same rows; None if no other does.
    """
    counts = _summed(counts, replicate_group)
    used_and_all = torch.stack([(counts > 0).sum(), torch.full_like(counts.sum(), len(counts))])
    used, num_slots = _summed(used_and_all, shard_group).tolist()
    return used / num_slots


def usage_kl(
    counts: Tensor,
    shard_group: dist.ProcessGroup | None = None,
    replicate_group: dist.ProcessGroup | None = None,
) -> float:
    """Returns `sum_i p_i log(p_i N)`, `p_i` the share of slot i: how far from even, in nats.

    0 where all slots are read equally often, log N where only one is; 0 without accesses. The
    arguments are those of `slots_used_fraction`.
    """
    c = _summed(counts, replicate_group).double()
    sums = torch.stack([c.sum(), torch.xlogy(c, c).sum(), c.new_tensor(len(c))])
    total, c_log_c, num_slots = _summed(sums, shard_group).tolist()
    if total == 0:
        return 0.0
    return c_log_c / total - math.log(total) + math.log(num_slots)


def _summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of a group; the tensor itself without one."""
    if group is None:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor
