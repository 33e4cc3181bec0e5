"""The sharded value table equals a dense table on one process, in float64 to 1e-12."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from tests.support.launch import run_on_ranks
from titan_smf.model.memory_layer import MemoryLayer
from titan_smf.model.value_table import INIT_BLOCK, ValueTable
from titan_smf.ops.routing import count_bytes, lookup_bytes
from titan_smf.runtime import rank, world_size

V_DIM = 6
K = 8
TOLERANCE = 1e-12

# name, number of slots, tokens of each rank, share of the slots that is ever read
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


def of_all_ranks(
    num_slots: int, tokens: tuple[int, ...], used: float, layer: int
) -> list[tuple[Tensor, ...]]:
    return [make_case(num_slots, tokens[r], used, 10 * layer + r) for r in range(world_size())]


def make_values(num_slots: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_slots)
    return torch.randn(num_slots, V_DIM, dtype=torch.float64, generator=generator)


def make_table(
    num_slots: int, mesh: DeviceMesh | None = None, dtype: torch.dtype = torch.float64
) -> ValueTable:
    with torch.device("meta"):
        table = ValueTable(num_slots, V_DIM, dtype)
    if mesh is not None:
        table.shard(mesh)
    table.to_empty(device="cpu")
    start, stop = table.row_range
    with torch.no_grad():
        local(table.values).copy_(make_values(num_slots)[start:stop])
    return table


def local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dense_lookup(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (values[slots] * weights.unsqueeze(-1)).sum(1)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def dense_reference(table: ValueTable, inputs: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """A dense lookup of all ranks' entries, and what this rank should see of it."""
    values = make_values(table.num_slots).requires_grad_()
    slots, weights, counted, gradient = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    weights.requires_grad_()
    output = dense_lookup(values, slots, weights)
    output.backward(gradient)
    first = sum(len(case[0]) for case in inputs[: rank()])
    mine = slice(first, first + len(inputs[rank()][0]))
    rows = slice(*table.row_range)
    assert values.grad is not None
    assert weights.grad is not None
    return {
        "output": output[mine],
        "weight gradient": weights.grad[mine],
        "row gradient": values.grad[rows],
        "access counts": torch.bincount(slots[counted].flatten(), minlength=table.num_slots)[rows],
    }


def check_equals_dense(table: ValueTable, name: str, inputs: list[tuple[Tensor, ...]]) -> None:
    """Output, accesses and gradients on this rank, where `inputs` are those of all ranks."""
    slots, weights, counted, gradient = inputs[rank()]
    weights = weights.clone().requires_grad_()
    table.values.grad = None
    output, accesses = table(slots, weights, counted)
    output.backward(gradient)
    table.reduce_replica_gradients()
    expected = dense_reference(table, inputs)
    assert weights.grad is not None
    assert close(output, expected["output"]), f"{name}: output"
    assert close(weights.grad, expected["weight gradient"]), f"{name}: weight gradient"
    assert close(local(table.values.grad), expected["row gradient"]), f"{name}: row gradient"
    counts = torch.bincount(accesses, minlength=len(expected["access counts"]))
    if isinstance(table.values, DTensor) and table.values.device_mesh.ndim == 2:
        dist.all_reduce(counts, group=table.values.device_mesh.get_group(0))
    assert torch.equal(counts, expected["access counts"]), f"{name}: padding is not counted"


def check_shard_of_real_values(mesh: DeviceMesh) -> None:
    """Splitting a real table gives every rank its rows, by DTensor's own rule."""
    for num_slots in (64, 49, 5, 2):
        table = ValueTable(num_slots, V_DIM, torch.float64)
        with torch.no_grad():
            table.values.copy_(make_values(num_slots))
        table.shard(mesh)
        assert isinstance(table.values, DTensor)
        own = distribute_tensor(make_values(num_slots), mesh, [Shard(0)]).to_local()
        assert torch.equal(table.values.to_local(), own)
        assert torch.equal(table.values.full_tensor(), make_values(num_slots))
        assert table.row_range[1] - table.row_range[0] == len(own)


def check_many_entries_per_token(mesh: DeviceMesh) -> None:
    """A token may ask one owner for more rows than a byte can count."""
    table, slots = make_table(49, mesh), torch.arange(300) % 3
    weights = torch.rand(1, 300, dtype=torch.float64)
    output, accesses = table(slots.unsqueeze(0), weights)
    assert close(output, dense_lookup(make_values(49), slots.unsqueeze(0), weights))
    assert len(accesses) == (300 * mesh.size() if rank() == 0 else 0)


def check_bytes(mesh: DeviceMesh) -> None:
    """The bytes that arrive are those of the formula, for evenly spread slots."""
    T = 10_000
    torch.manual_seed(rank())
    for dtype, entries in ((torch.float64, 8), (torch.bfloat16, 32), (torch.float32, 3)):
        table = make_table(4096, mesh)
        slots = torch.randint(4096, (T, entries))
        weights = torch.rand(slots.shape, dtype=dtype).requires_grad_()
        output, _ = table(slots, weights, torch.rand(T) < 0.5)
        forward = table.exchange.bytes_received if table.exchange else 0
        output.sum().backward()
        backward = table.exchange.bytes_received - forward if table.exchange else 0
        there, *back = lookup_bytes(T, entries, V_DIM, world_size(), dtype.itemsize)
        assert (forward, backward) == pytest.approx((there, sum(back)), rel=0.02)


def selections(num_slots: int) -> dict[str, Tensor]:
    """Global ids of the rows that learn, in very different places."""
    some = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))
    return {
        "some": some[: -(-num_slots // 3)].sort().values,
        "all": torch.arange(num_slots),
        "the first, of one owner": torch.arange(1),
        "none": torch.arange(0),
    }


def check_selected(table: ValueTable, name: str, layers: list[list[tuple[Tensor, ...]]]) -> None:
    """Only selected rows get a gradient, the sum over lookups; everything else is as ever.

    `layers` has, for each of two lookups, the inputs of all ranks. The first is of weights that
    need no gradient, as in the first memory layer of a frozen model.
    """
    expected = [dense_reference(table, inputs) for inputs in layers]
    start, stop = table.row_range
    for which, ids in selections(table.num_slots).items():
        rows = ids[(ids >= start) & (ids < stop)] - start
        selected = table.select(rows)
        for inputs, reference in zip(layers, expected, strict=True):
            slots, weights, counted, gradient = inputs[rank()]
            weights = weights.clone().requires_grad_(inputs is layers[1])
            output, accesses = table(slots, weights, counted, selected)
            output.backward(gradient)
            assert close(output, reference["output"]), f"{name}, {which}: all slots are read"
            assert torch.equal(accesses, table.count(slots, counted)), f"{name}, {which}"
            if weights.requires_grad:
                assert close(local(weights.grad), reference["weight gradient"]), f"{name}, {which}"
        table.reduce_replica_gradients(selected)
        of_rows = (expected[0]["row gradient"] + expected[1]["row gradient"])[rows]
        assert close(selected.gradient, of_rows), f"{name}, {which}: row gradient"
        assert table.values.grad is None, f"{name}, {which}: no gradient of the table's size"


def check_cases(mesh: DeviceMesh | None) -> None:
    for name, num_slots, tokens, used in CASES:
        layers = [of_all_ranks(num_slots, tokens, used, layer) for layer in range(2)]
        check_equals_dense(make_table(num_slots, mesh), name, layers[0])
        check_selected(make_table(num_slots, mesh), name, layers)


def check_selected_in_bfloat16(mesh: DeviceMesh) -> None:
    """The gradients of micro-batches add up in float32: a hundred of 1 and then 1/4 is seen."""
    table = make_table(49, mesh, torch.bfloat16)
    selected = table.select(torch.arange(min(1, table.row_range[1] - table.row_range[0])))
    slots = torch.zeros(1, 1, dtype=torch.int64)
    for weight in [1.0] * 100 + [0.25]:
        weights = torch.full((1, 1), weight if rank() == 0 else 0.0, dtype=torch.bfloat16)
        table(slots, weights, None, selected)[0].sum().backward()
    assert selected.gradient.dtype == torch.float32
    if table.row_range[0] == 0:
        assert (selected.gradient == 100.25).all()


def check_count_bytes(mesh: DeviceMesh) -> None:
    """Counting moves the ids of tokens that count, and nothing else."""
    T = 1000
    torch.manual_seed(rank())
    table, slots, counted = make_table(4096, mesh), torch.randint(4096, (T, K)), torch.rand(T) < 0.3
    accesses = table.count(slots, counted)
    assert torch.equal(accesses, table(slots, torch.rand(T, K), counted)[1])
    assert torch.equal(table.count(slots), table(slots, torch.rand(T, K))[1])
    if table.exchange is not None:
        before = table.exchange.bytes_received
        table.count(slots, counted)
        received = table.exchange.bytes_received - before
        assert received == pytest.approx(count_bytes(int(counted.sum()), K, world_size()), rel=0.1)


def check_recomputed(mesh: DeviceMesh) -> None:
    """Activation checkpointing changes no gradient."""
    slots, weights, _, gradient = make_case(49, 3 + rank(), 1.0, rank())
    gradients = []
    for recompute in (False, True):
        table, w = make_table(49, mesh), weights.clone().requires_grad_()

        def lookup(w: Tensor, table: ValueTable = table) -> Tensor:
            return table(slots, torch.tanh(w))[0]

        output = checkpoint(lookup, w, use_reentrant=False) if recompute else lookup(w)
        output.backward(gradient)
        gradients.append((local(w.grad), local(table.values.grad)))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def check_two_readers(mesh: DeviceMesh) -> None:
    """Two layers that read one table give it the sum of their gradients."""
    table = make_table(49, mesh)
    both = [of_all_ranks(49, (4, 4, 4, 4), 1.0, layer) for layer in range(2)]
    for slots, weights, _, gradient in (inputs[rank()] for inputs in both):
        table(slots, weights)[0].backward(gradient)
    expected = sum(dense_reference(table, inputs)["row gradient"] for inputs in both)
    assert isinstance(expected, Tensor)
    assert close(local(table.values.grad), expected)


def check_frozen(mesh: DeviceMesh) -> None:
    """Frozen values get no gradient, the weights still do; and the other way round."""
    slots, weights, _, gradient = make_case(49, 4, 1.0, rank())
    table = make_table(49, mesh)
    table(slots, weights)[0].backward(gradient)
    rows = local(table.values.grad)
    table.values.grad = None
    table.values.requires_grad_(False)
    weights.requires_grad_()
    table(slots, weights)[0].backward(gradient)
    assert table.values.grad is None
    assert weights.grad is not None
    assert rows.abs().sum() > 0


def check_low_precision(mesh: DeviceMesh) -> None:
    """bfloat16 activations or values stay close to float64; the weights decide the dtype."""
    slots, weights, _, gradient = make_case(49, 4, 1.0, rank())
    exact = dense_lookup(make_values(49), slots, weights)
    for values_dtype in (torch.float32, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            table, w = make_table(49, mesh, values_dtype), weights.to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                output, _ = table(slots, w)
            assert output.dtype == dtype
            tolerance = 1e-5 if values_dtype == dtype == torch.float32 else 0.1
            assert (output - exact).abs().max() < tolerance
            output.backward(gradient.to(dtype))
            assert local(table.values.grad).dtype == values_dtype
            assert local(w.grad).dtype == dtype


def initial_values(mesh: DeviceMesh | None) -> Tensor:
    """The rows of this rank, where its range begins and ends inside blocks of the generator."""
    with torch.device("meta"):
        table = ValueTable(2 * INIT_BLOCK + 7, V_DIM)
    if mesh is not None:
        table.shard(mesh)
    table.to_empty(device="cpu").init_weights(seed=3)
    return local(table.values).detach()


def check_everything(_: int, ranks: int) -> Tensor:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    for check in (
        check_cases,
        check_shard_of_real_values,
        check_many_entries_per_token,
        check_selected_in_bfloat16,
        check_bytes,
        check_count_bytes,
        check_recomputed,
        check_two_readers,
        check_frozen,
        check_low_precision,
    ):
        check(mesh)
    if ranks == 4:
        hsdp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
        check_cases(hsdp)
    return initial_values(mesh)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sharded_lookup_and_gradients_equal_dense(ranks: int) -> None:
    initial = run_on_ranks(check_everything, ranks)
    assert torch.equal(torch.cat(initial), initial_values(None)), "whatever the number of ranks"


def test_lookup_and_gradients_without_ranks_equal_dense() -> None:
    check_cases(None)


def test_a_memory_layer_hands_the_selection_to_its_table() -> None:
    layer, table = MemoryLayer(5, 7, 2, 3, 4, V_DIM, qk_norm=False).double(), make_table(49)
    layer.init_weights(init_std=1.0)
    selected = table.select(torch.arange(0, 49, 2))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    layer(x, table)[0].sum().backward()
    expected = local(table.values.grad)[selected.rows]
    table.values.grad = None
    layer(x, table, None, selected)[0].sum().backward()
    assert table.values.grad is None
    assert close(selected.gradient, expected)
    assert selected.gradient.abs().sum() > 0


@pytest.mark.parametrize("rows", [[3, 1], [1, 1]])
def test_rows_out_of_order_or_twice_are_not_selected(rows: list[int]) -> None:
    with pytest.raises(AssertionError, match="ascend"):
        make_table(49).select(torch.tensor(rows))


def test_initial_values_have_the_published_spread_and_depend_on_the_seed() -> None:
    table = ValueTable(3000, 64)
    table.init_weights(seed=1)
    first = table.values.detach().clone()
    assert first.std() == pytest.approx(64**-0.5, rel=0.02)
    assert abs(first.mean()) < 0.01
    assert not torch.equal(first[:INIT_BLOCK], first[INIT_BLOCK : 2 * INIT_BLOCK])
    table.init_weights(seed=2)
    assert not torch.equal(first, table.values)
