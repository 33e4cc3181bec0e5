"""The memory's values: one (N, V) parameter split by rows over the ranks, read by routed lookups.

    T tokens, K slots per token, N slots, R rows here, W ranks, V value dim

FSDP would gather the table for every layer that reads it: 4 GiB at 1M slots of 1024 values. Here
every row stays with its owner, and the lookups travel (`ops/routing.py`). In a step of 8K tokens a
rank, bf16, V = 1024, that is 270 MiB a rank on 8 ranks, against 5376 MiB to gather the table.
Keep a table out of FSDP by `ignored_params`; `shard` splits it.
"""

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
    Splits,
    Wire,
    add_partials,
    return_weight_gradient,
    route_entries,
    rows_per_rank,
    spread_gradient,
)
from titan_smf.ops.row_gradient import dense_row_gradient

INIT_BLOCK = 1024
"""Rows drawn by one generator. Part of the definition of the initial values: do not change."""


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
        self.wire: Wire | None = None
        """The shard group with its count of received bytes; None where one rank holds all rows."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share this table's rows among them; None where one rank holds all."""
        return None if self.wire is None else self.wire.group

    @property
    def row_range(self) -> tuple[int, int]:
        """The slots `start <= slot < stop` of this rank; equal where it holds none."""
        if self.wire is None:
            return 0, self.num_slots
        block = rows_per_rank(self.num_slots, self.wire.world_size)
        start = min(self.num_slots, self.wire.rank * block)
        return start, min(self.num_slots, start + block)

    def shard(self, mesh: DeviceMesh) -> None:
        """Splits the rows over a mesh (fsdp), or over the last dimension of (dp_replicate, fsdp).

        `values` becomes a DTensor parameter. On the meta device nothing is allocated; real values
        must be the same on every rank, and each keeps a copy of its rows.
        """
        placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        group = mesh.get_group(mesh.ndim - 1)
        self.wire = Wire(group) if dist.get_world_size(group) > 1 else None
        start, stop = self.row_range
        local = self.values.detach()[start:stop].clone()
        values = DTensor.from_local(
            local, mesh, placements, shape=self.values.shape, stride=self.values.stride()
        )
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws the values from N(0, std = V**-0.5), the same for any number and kind of ranks.

        Each block of rows has its own generator on the CPU, seeded by (seed, block). Needs the
        memory of one block beside the table, and draws only the blocks that have rows here.
        """
        start, stop = self.row_range
        local = self._local_values()
        for block in range(start // INIT_BLOCK, -(-stop // INIT_BLOCK)):
            mixed = np.random.SeedSequence([seed, block]).generate_state(1)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            rows = torch.randn(INIT_BLOCK, self.v_dim, generator=generator) * self.v_dim**-0.5
            first = block * INIT_BLOCK
            begin, end = max(start, first), min(stop, first + INIT_BLOCK)
            local[begin - start : end - start].copy_(rows[begin - first : end - first])

    @torch.compiler.disable
    def forward(
        self, slots: Tensor, weights: Tensor, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns `output[t] = sum_k weights[t, k] * values[slots[t, k]]` and the rows read here.

        All ranks of the shard group call it together. Differentiable with respect to the weights
        and the values; the gradient of a row is made by its owner from the whole group's tokens.

        Args:
            slots: (T, K) int64. T may differ among ranks and be 0.
            weights: (T, K).
            counted: (T,) bool, false for padding: read all the same, but not among the accesses.

        Returns:
            output (T, V) in the weights' dtype, and accesses: one local row id (int32 or int64)
            for every entry by which a token of the group that counts read a row of this rank.
        """
        values = self._local_values()
        with torch.autocast(slots.device.type, enabled=False):
            if self.wire is None:
                return _LocalLookup.apply(values, weights, slots, counted)
            return _RoutedLookup.apply(values, weights, slots, counted, self.wire, self.num_slots)

    def reduce_replica_gradients(self) -> None:
        """Sums the gradient over the replicas of these rows, if there are any.

        Call it once a step, after the backward pass of the last micro-batch.
        """
        gradient = self.values.grad
        if isinstance(gradient, DTensor) and gradient.device_mesh.ndim == 2:
            dist.all_reduce(gradient.to_local(), group=gradient.device_mesh.get_group(0))

    def _local_values(self) -> Tensor:
        return self.values.to_local() if isinstance(self.values, DTensor) else self.values


class _LocalLookup(torch.autograd.Function):
    """The lookup where all rows are here: each token is one bag of K entries."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weights: Tensor, slots: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        T, K = slots.shape
        rows = slots.flatten()
        offsets = torch.arange(0, T * K, K, device=slots.device)
        output = weighted_bags(values, rows, offsets, weights.flatten())
        accesses = rows if counted is None else slots[counted].flatten()
        ctx.save_for_backward(values, rows, offsets, weights)
        ctx.mark_non_differentiable(accesses)
        return output.to(weights.dtype), accesses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        values, rows, offsets, weights = ctx.saved_tensors
        of_values, of_weights = _gradients(
            ctx, values, rows, offsets, weights.flatten(), gradient.to(values.dtype)
        )
        if of_weights is not None:
            of_weights = of_weights.to(weights.dtype).view_as(weights)
        return of_values, of_weights, None, None


class _RoutedLookup(torch.autograd.Function):
    """The lookup where rows are spread over ranks: owners make partial sums, the token adds them.

    Owners compute in the dtype of the values; what travels has the dtype of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weights: Tensor,
        slots: Tensor,
        counted: Tensor | None,
        wire: Wire,
        num_slots: int,
    ) -> tuple[Tensor, Tensor]:
        route = route_entries(wire, slots, weights, counted, num_slots)
        partials = weighted_bags(values, route.rows, route.offsets, route.weights)
        output = add_partials(
            wire, route.splits, route.token, partials.to(weights.dtype), slots.shape[0]
        )
        ctx.save_for_backward(
            values, route.rows, route.offsets, route.weights, route.order, route.token
        )
        ctx.wire, ctx.splits, ctx.shape = wire, route.splits, weights.shape
        ctx.mark_non_differentiable(route.accesses)
        return output, route.accesses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        values, rows, offsets, weights, order, token = ctx.saved_tensors
        wire: Wire = ctx.wire
        splits: Splits = ctx.splits
        gradient = spread_gradient(wire, splits, token, gradient).to(values.dtype)
        of_values, of_weights = _gradients(ctx, values, rows, offsets, weights, gradient)
        if of_weights is not None:
            of_weights = return_weight_gradient(wire, splits, order, of_weights.to(weights.dtype))
            of_weights = of_weights.view(ctx.shape)
        return of_values, of_weights, None, None, None, None


def _gradients(
    ctx: Any, values: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor, bags: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """An owner's gradients of the values (R, V) and of the entries' weights (M,), as far as they
    are needed, from those of its bags (B, V)."""
    of_values = of_weights = None
    needs_values, needs_weights = ctx.needs_input_grad[:2]
    if needs_values:
        entry_bags = bag_of_entry(offsets, rows.shape[0])
        of_values = dense_row_gradient(rows, entry_bags, weights, bags, values.shape[0])
    if needs_weights:
        of_weights = weight_gradient(values, rows, offsets, bags)
    return of_values, of_weights
