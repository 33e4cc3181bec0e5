"""The sharded value table equals a dense table on one process, in float64 to 1e-12."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.checkpoint import checkpoint

from titan_smf.model.value_table import ValueTable
from titan_smf.ops.routing import lookup_bytes

V_DIM = 6
K = 8
TOLERANCE = 1e-12

# name, number of slots, tokens per rank (cycled), share of the slots that is ever read
CASES = [
    ("even", 64, (5, 5, 5, 5), 1.0),
    ("uneven rows and tokens", 49, (3, 7, 1, 4), 1.0),
    ("an empty shard", 5, (4, 2, 3, 6), 1.0),
    ("fewer slots than ranks", 2, (4, 2, 3, 6), 1.0),
    ("the first owner gets everything", 49, (5, 4, 3, 2), 0.1),
    ("a rank without tokens", 49, (6, 0, 4, 3), 1.0),
    ("no tokens at all", 49, (0, 0, 0, 0), 1.0),
]


def make_case(num_slots: int, tokens: int, used: float, seed: int) -> tuple[Tensor, ...]:
    """The entries, padding mask and output gradient of one rank."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(max(1, int(num_slots * used)), (tokens, K), generator=generator)
    slots[:, 1] = slots[:, 0]  # a slot twice in a token
    weights = torch.randn(tokens, K, generator=generator, dtype=torch.float64)
    counted = torch.rand(tokens, generator=generator) < 0.7
    gradient = torch.randn(tokens, V_DIM, generator=generator, dtype=torch.float64)
    return slots, weights, counted, gradient


def make_values(num_slots: int) -> Tensor:
    return torch.randn(num_slots, V_DIM, dtype=torch.float64, generator=torch.Generator())


def make_table(num_slots: int, mesh: Any = None, dtype: torch.dtype = torch.float64) -> ValueTable:
    with torch.device("meta"):
        table = ValueTable(num_slots, V_DIM, dtype)
    if mesh is not None:
        table.shard(mesh)
    table.to_empty(device="cpu")
    start, stop = table.row_range
    local = table.values.to_local() if isinstance(table.values, DTensor) else table.values
    with torch.no_grad():
        local.copy_(make_values(num_slots)[start:stop])
    return table


def dense_lookup(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (values[slots] * weights.unsqueeze(-1)).sum(1)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=TOLERANCE)


def local_gradient(table: ValueTable) -> Tensor:
    gradient = table.values.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def check_equals_dense(table: ValueTable, name: str, inputs: list[tuple[Tensor, ...]]) -> None:
    """Output, accesses and both gradients of this rank, where `inputs` are those of all ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    slots, weights, counted, gradient = inputs[rank]
    weights = weights.clone().requires_grad_()
    table.values.grad = None
    output, accesses = table(slots, weights, counted)
    output.backward(gradient)

    values = make_values(table.num_slots).requires_grad_()
    all_weights = torch.cat([case[1] for case in inputs]).requires_grad_()
    all_slots = torch.cat([case[0] for case in inputs])
    dense = dense_lookup(values, all_slots, all_weights)
    dense.backward(torch.cat([case[3] for case in inputs]))
    assert values.grad is not None
    assert all_weights.grad is not None
    assert weights.grad is not None
    mine = slice(sum(len(case[0]) for case in inputs[:rank]), None)
    start, stop = table.row_range
    tokens = len(slots)
    assert close(output, dense[mine][:tokens]), f"{name}: output"
    assert close(weights.grad, all_weights.grad[mine][:tokens]), f"{name}: weight gradient"
    assert close(local_gradient(table), values.grad[start:stop]), f"{name}: row gradient"

    counting = all_slots[torch.cat([case[2] for case in inputs])].flatten()
    expected = torch.bincount(counting, minlength=table.num_slots)[start:stop]
    counts = torch.bincount(accesses, minlength=stop - start)
    assert torch.equal(counts, expected), f"{name}: accesses leave padding out"


def check_ranks(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    for name, num_slots, tokens, used in CASES:
        inputs = [make_case(num_slots, tokens[r], used, r) for r in range(world_size)]
        check_equals_dense(make_table(num_slots, mesh), name, inputs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_lookup_and_gradients_equal_dense(world_size: int) -> None:
    run_on_ranks(check_ranks, world_size)


def test_without_process_group_lookup_and_gradients_equal_dense() -> None:
    for name, num_slots, tokens, used in CASES:
        check_equals_dense(make_table(num_slots), name, [make_case(num_slots, tokens[0], used, 0)])
