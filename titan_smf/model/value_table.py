"""The memory's values: one (N, V) parameter split by rows over the ranks, read by routed lookups.

    T tokens, K slots per token, N slots, R rows here, S selected rows here, W ranks, V value dim

FSDP would gather the table for every layer that reads it: 4 GiB at 1M slots of 1024 values. Here
every row stays with its owner, and the lookups travel (`ops/routing.py`). In a step of 8K tokens a
rank, bf16, V = 1024, that is 270 MiB a rank on 8 ranks, against 5376 MiB to gather the table.
Keep a table out of FSDP by `ignored_params`; `shard` splits it.

Where only a few rows learn, `select` them and hand them to the lookups: their gradient is (S, V),
and nothing of the table's size is made.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_smf.ops.embedding_bag import bag_of_entry, weight_gradient, weighted_bags
from titan_smf.ops.routing import (
    RankExchange,
    add_partials,
    return_weight_gradient,
    route_entries,
    rows_per_rank,
    send_output_gradient,
    send_rows,
)
from titan_smf.ops.row_gradient import dense_row_gradient, selected_row_gradient

INIT_BLOCK = 1024
"""Rows drawn by one generator. Part of the definition of the initial values: do not change."""


@dataclass(frozen=True)
class SelectedRows:
    """The rows of this rank that learn in a step; made by `ValueTable.select`."""

    rows: Tensor
    """(S,) int64, ascending: local row ids."""
    values: Tensor
    """(S, V), a leaf that requires a gradient: a copy of the rows. Its `grad` receives the sum of
    their gradients over all lookups that were given this selection. At least float32, so that
    micro-batches add up in it."""

    @property
    def gradient(self) -> Tensor:
        """(S, V), after a backward pass; zero for a row that no lookup read."""
        assert self.values.grad is not None, "a lookup with this selection, then a backward pass"
        return self.values.grad


class ValueTable(nn.Module):
    """N rows of V values, read as weighted sums of rows; one object may serve several layers.

    Args:
        num_slots: N.
        v_dim: V.
        dtype: of the values. Sums are computed in it, and travel in the dtype of the weights.
    """

    def __init__(self, num_slots: int, v_dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.v_dim = v_dim
        self.values = nn.Parameter(torch.empty(num_slots, v_dim, dtype=dtype))
        self.exchange: RankExchange | None = None
        """The shard group with its count of received bytes; None where one rank holds all rows."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share this table's rows among them; None where one rank holds all."""
        return None if self.exchange is None else self.exchange.group

    @property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same rows; None where no other rank does."""
        mesh = self.values.device_mesh if isinstance(self.values, DTensor) else None
        return mesh.get_group(0) if mesh is not None and mesh.ndim > 1 else None

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is the one that writes its rows, of those that hold them."""
        return self.replicate_group is None or dist.get_rank(self.replicate_group) == 0

    @property
    def row_range(self) -> tuple[int, int]:
        """The slots `start <= slot < stop` of this rank; equal where it holds none."""
        if self.exchange is None:
            return 0, self.num_slots
        block = rows_per_rank(self.num_slots, self.exchange.world_size)
        start = min(self.num_slots, self.exchange.rank * block)
        return start, min(self.num_slots, start + block)

    def shard(self, mesh: DeviceMesh) -> None:
        """Split the rows over a mesh (fsdp), or over the last dimension of (dp_replicate, fsdp).

        `values` becomes a DTensor parameter. On the meta device nothing is allocated; real values
        must be the same on every rank, and each keeps a copy of its rows.
        """
        placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        group = mesh.get_group(mesh.ndim - 1)
        self.exchange = RankExchange(group) if dist.get_world_size(group) > 1 else None
        start, stop = self.row_range
        local = self.values.detach()[start:stop].clone()
        values = DTensor.from_local(
            local, mesh, placements, shape=self.values.shape, stride=self.values.stride()
        )
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the values from N(0, std = V**-0.5), the same for any number and kind of ranks.

        Each block of rows has its own generator on the CPU, seeded by (seed, block). Needs the
        memory of one block beside the table, and draws only the blocks that have rows here.
        """
        start, stop = self.row_range
        local = self.local_values()
        for block in range(start // INIT_BLOCK, -(-stop // INIT_BLOCK)):
            mixed = np.random.SeedSequence([seed, block]).generate_state(1)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            rows = torch.randn(INIT_BLOCK, self.v_dim, generator=generator) * self.v_dim**-0.5
            first = block * INIT_BLOCK
            begin, end = max(start, first), min(stop, first + INIT_BLOCK)
            local[begin - start : end - start].copy_(rows[begin - first : end - first])

    def local_values(self) -> Tensor:
        """Return the rows of this rank, (R, V), sharing the parameter's memory."""
        return self.values.to_local() if isinstance(self.values, DTensor) else self.values

    @torch.no_grad()
    def select(self, rows: Tensor) -> SelectedRows:
        """Select rows of this rank, (S,) int64 ascending; S may be 0."""
        assert bool((rows[1:] > rows[:-1]).all()), "selected rows ascend, each of them once"
        values = self.local_values().index_select(0, rows)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return SelectedRows(rows, values.requires_grad_())

    @torch.compiler.disable
    def forward(
        self,
        slots: Tensor,
        weights: Tensor,
        counted: Tensor | None = None,
        selected: SelectedRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `output[t] = sum_k weights[t, k] * values[slots[t, k]]` and the rows read here.

        All ranks of the shard group call it together. Differentiable with respect to the weights
        and the values, or the selected rows; the gradient of a row is made by its owner from the
        whole group's tokens.

        Args:
            slots: (T, K) int64. T may differ among ranks and be 0.
            weights: (T, K).
            counted: (T,) bool, false for padding: read all the same, but not among the accesses.
            selected: the rows that get a gradient, in `selected.values`; the table itself gets
                none. Every rank gives its own, even if empty, or none of them does.

        Returns:
            output (T, V) in the weights' dtype, and accesses: one local row id (int32 or int64)
            for every entry by which a token of the group that counts read a row of this rank.
        """
        values = self.local_values()
        rows = learning = None
        if selected is not None:
            values, rows, learning = values.detach(), selected.rows, selected.values
        with torch.autocast(slots.device.type, enabled=False):
            return _Lookup.apply(
                values, weights, learning, rows, slots, counted, self.exchange, self.num_slots
            )

    @torch.no_grad()
    @torch.compiler.disable
    def count(self, slots: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the accesses that `forward` would return, without reading a row. Collective."""
        if self.exchange is None:
            return slots.flatten() if counted is None else slots[counted].flatten()
        return send_rows(self.exchange, slots, counted, self.num_slots)

    def reduce_replica_gradients(self, selected: SelectedRows | None = None) -> None:
        """Sum the gradient of the table, or of the selected rows, over the replicas, if any.

        Call it once a step, after the backward pass of the last micro-batch. Replicas select the
        same rows.
        """
        gradient = self.values.grad if selected is None else selected.gradient
        if gradient is not None and self.replicate_group is not None:
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(gradient, group=self.replicate_group)


class _Lookup(torch.autograd.Function):
    """The weighted sums, where all rows are here or spread over the ranks of an exchange.

    An owner sees bags of entries. Where all rows are here, each token is one bag of K entries; else
    a bag is what one token asks one owner for: owners make partial sums, the token adds them.
    Owners compute in the dtype of the values; what travels has the dtype of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weights: Tensor,
        learning: Tensor | None,
        selected: Tensor | None,
        slots: Tensor,
        counted: Tensor | None,
        exchange: RankExchange | None,
        num_slots: int,
    ) -> tuple[Tensor, Tensor]:
        T, K = slots.shape
        order = token = splits = None
        if exchange is None:
            rows, entry_weights = slots.flatten(), weights.flatten()
            offsets = torch.arange(0, T * K, K, device=slots.device)
            output = weighted_bags(values, rows, offsets, entry_weights).to(weights.dtype)
            accesses = rows if counted is None else slots[counted].flatten()
        else:
            route = route_entries(exchange, slots, weights, counted, num_slots)
            rows, offsets, entry_weights = route.rows, route.offsets, route.weights
            partials = weighted_bags(values, rows, offsets, entry_weights).to(weights.dtype)
            output = add_partials(route.splits, route.token, partials, T)
            accesses, splits = route.accesses, route.splits
            order, token = route.order, route.token
        ctx.save_for_backward(values, rows, offsets, entry_weights, selected, order, token)
        ctx.splits, ctx.shape = splits, weights.shape
        ctx.mark_non_differentiable(accesses)
        return output, accesses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        values, rows, offsets, weights, selected, order, token = ctx.saved_tensors
        of_values = of_weights = of_selected = None
        if ctx.splits is not None:
            gradient = send_output_gradient(ctx.splits, token, gradient)
        of_bags = gradient.to(values.dtype)
        needs_values, needs_weights = ctx.needs_input_grad[:2]
        if needs_values:
            entry_bags = bag_of_entry(offsets, rows.shape[0])
            of_values = dense_row_gradient(rows, entry_bags, weights, of_bags, values.shape[0])
        if needs_weights:
            of_weights = weight_gradient(values, rows, offsets, of_bags).to(weights.dtype)
            if ctx.splits is not None:
                of_weights = return_weight_gradient(ctx.splits, order, of_weights)
            of_weights = of_weights.view(ctx.shape)
        if selected is not None:
            of_selected = selected_row_gradient(selected, rows, offsets, weights, of_bags)
            of_selected = of_selected.to(torch.promote_types(values.dtype, torch.float32))
        return of_values, of_weights, of_selected, None, None, None, None, None
