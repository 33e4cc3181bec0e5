"""How the background data uses the memory slots: in how many documents, and how often.

    N slots of a table, R rows here, W ranks

A background *document* is one global batch of fixed size, so that the counts do not depend on the
number of ranks. Every rank counts for the slots it owns; `idf_file.py` has the file of the result.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.ops.routing import rows_per_rank
from titan_smf.sparse.accesses import OwnedSlots, TouchedSlots


@dataclass(frozen=True)
class Background:
    """The counts of a file, for the slots of one rank.

    The arrays are (tables * R,), as `OwnedSlots` says.
    """

    owned: OwnedSlots
    df: Tensor
    """int32: the number of documents that accessed the slot at least once."""
    counts: Tensor
    """int64: how often the documents accessed the slot."""
    documents: int
    """The number of documents, |B|."""
    accesses: int
    """The sum of `counts` over the slots of all ranks."""


class DocumentFrequency:
    """Counts documents for the slots of one rank.

    Args:
        owned: the slots.
        device: where the documents' touched slots are.
    """

    def __init__(self, owned: OwnedSlots, device: torch.device | str) -> None:
        self.owned = owned
        self.df = torch.zeros(len(owned), dtype=torch.int32, device=device)
        self.counts = torch.zeros(len(owned), dtype=torch.int64, device=device)
        self.documents = 0

    def resume(self, background: Background) -> None:
        """Go on from the counts of a partial file, as if they had been made here."""
        self.df.copy_(background.df)
        self.counts.copy_(background.counts)
        self.documents = background.documents

    def add_document(self, touched: TouchedSlots) -> None:
        """Count one document, given what all its tokens touched here (all replicas' too)."""
        here = self.owned.positions(touched.ids)
        self.df[here] += 1  # ids are distinct
        self.counts[here] += touched.counts
        self.documents += 1

    def gather(self, shard_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor] | None:
        """Return df and counts of all slots, (tables * N,), on the CPU of the group's first rank.

        All ranks of the shard group call it together; the others get None and hold no more than
        one table's rows of theirs a second time.
        """
        df, counts = (_gather_tables(x, self.owned, shard_group) for x in (self.df, self.counts))
        return None if df is None or counts is None else (df, counts)


def addressing_fingerprint(keys_and_queries: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of the tensors that decide which slots a token reads.

    Equal after sparse finetuning, which changes values alone; different for any other model.

    Args:
        keys_and_queries: keys, query projections and gains of all memory layers, whole.
    """
    digest = hashlib.sha256()
    for name in sorted(keys_and_queries):
        tensor = keys_and_queries[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _gather_tables(
    local: Tensor, owned: OwnedSlots, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Return an array over all slots on the group's first rank, from one over each rank's slots."""
    if group is None:
        return local.cpu()
    world_size = dist.get_world_size(group)
    is_first = dist.get_rank(group) == 0
    block = rows_per_rank(owned.num_slots, world_size)
    tables = []
    for rows in local.view(owned.num_tables, -1):
        sent = rows.new_zeros(block)  # the last ranks may own fewer rows, or none
        sent[: len(rows)] = rows
        received = [torch.empty_like(sent) for _ in range(world_size)] if is_first else None
        dist.gather(sent, received, group=group, group_dst=0)
        if received is not None:
            tables.append(torch.cat(received)[: owned.num_slots].cpu())
    return torch.cat(tables) if is_first else None
