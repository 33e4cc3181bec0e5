"""Row optimizers change the selected rows alone, each by its own clock, on any number of ranks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import ProfilerActivity, profile

from tests.support.launch import run_on_ranks
from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.sparse.row_optimizer import RowAdamW, RowOptimizer, RowSGD, clip_row_gradients
from titan_smf.sparse.row_store import RowStore

N, V, K, T = 23, 6, 5, 13
TOLERANCE = 1e-12
ADAMW: Any = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
SGD: Any = {"lr": 0.05, "weight_decay": 0.3}
Build = Callable[[ValueTable], RowOptimizer]
BUILDS: dict[str, Build] = {
    "AdamW": lambda table: RowAdamW(table, **ADAMW, keep_base=True),
    "SGD": lambda table: RowSGD(table, **SGD, keep_base=True),
}
DENSE: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdamW": lambda rows: torch.optim.AdamW(rows, **ADAMW),
    "SGD": lambda rows: torch.optim.SGD(rows, **SGD),
}


def make_table(
    dtype: torch.dtype = torch.float64, mesh: DeviceMesh | None = None, values: Tensor | None = None
) -> ValueTable:
    table = ValueTable(N, V, dtype)
    with torch.no_grad():
        if values is None:
            values = torch.randn(N, V, generator=torch.Generator().manual_seed(7))
        table.values.copy_(values)
    if mesh is not None:
        table.shard(mesh)
    table.values.requires_grad_(False)
    return table


def selected_ids(step: int) -> Tensor:
    """Global ids; of the last five rows none is ever selected, and at times no row is."""
    generator = torch.Generator().manual_seed(100 + step)
    number = 0 if step == 3 else 4
    return torch.randperm(N - 5, generator=generator)[:number].sort().values


def select_with_gradient(table: ValueTable, step: int) -> SelectedRows:
    selected = table.select(selected_ids(step))
    generator = torch.Generator().manual_seed(step)
    gradient = torch.randn(selected.values.shape, dtype=torch.float64, generator=generator)
    selected.values.grad = gradient.to(selected.values.dtype)
    return selected


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_a_row_moves_as_if_only_its_own_steps_existed(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Every row against torch's optimizer over the steps in which it was selected."""
    table = make_table(dtype)
    optimizer = BUILDS[name](table)
    rows = [row.clone() for row in table.values.double()]
    dense = [DENSE[name]([row]) for row in rows]
    for step in range(40):
        selected = select_with_gradient(table, step)
        for row, gradient in zip(selected.rows.tolist(), selected.gradient.double(), strict=True):
            rows[row].grad = gradient.clone()
            dense[row].step()
        optimizer.step(selected)
        torch.testing.assert_close(
            table.values.double(), torch.stack(rows), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("name", BUILDS)
def test_rows_never_selected_keep_every_bit_and_have_no_state(name: str) -> None:
    table = make_table(torch.float32)
    before = table.values.clone()
    optimizer = BUILDS[name](table)
    ever: set[int] = set()
    for step in range(40):
        selected = select_with_gradient(table, step)
        optimizer.step(selected)
        ever |= set(selected.rows.tolist())
    changed = (table.values != before).any(1).nonzero().squeeze(1)
    assert changed.tolist() == sorted(ever)
    assert len(ever) < N
    state = optimizer.state_tensors()
    assert state["rows"].tolist() == sorted(ever)
    assert {len(tensor) for tensor in state.values()} == {len(ever)}
    assert torch.equal(state["base"], before[sorted(ever)]), "values from before the first change"


@pytest.mark.parametrize("name", BUILDS)
def test_bfloat16_rows_are_computed_in_float32_and_rounded_to_nearest(name: str) -> None:
    exact, table = make_table(), make_table(torch.bfloat16)
    with torch.no_grad():
        exact.values.copy_(table.values)
    for each in (exact, table):
        BUILDS[name](each).step(select_with_gradient(each, 0))
    assert torch.equal(table.values, exact.values.float().to(torch.bfloat16))


def test_a_schedule_sets_the_rate() -> None:
    table = make_table()
    optimizer = RowSGD(table, lr=2.0)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        selected = select_with_gradient(table, step)
        expected = table.values[selected.rows] - 2.0 / (1 + step) * selected.gradient
        optimizer.step(selected)
        schedule.step()
        torch.testing.assert_close(table.values[selected.rows], expected, rtol=0, atol=1e-15)


def test_state_of_another_optimizer_is_refused() -> None:
    table = make_table()
    state = RowSGD(table, lr=1.0).state_tensors()
    with pytest.raises(ValueError, match="first_moment"):
        RowAdamW(table, lr=1.0).load_state_tensors([state])


def test_a_store_finds_rows_as_a_dictionary_does() -> None:
    torch.manual_seed(0)
    store = RowStore(
        {"value": ((2,), torch.float64), "count": ((), torch.int32)}, torch.device("cpu")
    )
    expected: dict[int, tuple[list[float], int]] = {}
    for size in (0, 3, 0, 1, 40, 7, 300, 300):
        rows = torch.randperm(1000)[:size].sort().values
        places, is_new = store.put(rows)
        assert is_new.tolist() == [row not in expected for row in rows.tolist()]
        assert (store.tensors["count"][places[is_new]] == 0).all()
        assert (store.tensors["value"][places[is_new]] == 0).all()
        store.tensors["count"][places] += 1
        store.tensors["value"][places] = torch.rand(size, 2, dtype=torch.float64)
        for row, value in zip(rows.tolist(), store.tensors["value"][places].tolist(), strict=True):
            expected[row] = value, expected.get(row, ([], 0))[1] + 1
    assert len(store) == len(expected)
    assert store.rows().tolist() == sorted(expected)
    in_order = [expected[row] for row in sorted(expected)]
    assert store.in_order("value").tolist() == [value for value, _ in in_order]
    assert store.in_order("count").tolist() == [count for _, count in in_order]


def peak_of_a_step(num_slots: int) -> int:
    """Bytes by which a step's memory rises above what is there before: lookup, backward, update."""
    table = ValueTable(num_slots, 16)
    table.init_weights(seed=0)
    table.values.requires_grad_(False)
    optimizer = RowAdamW(table, lr=0.1, keep_base=True)
    slots, weights = torch.arange(64).view(8, 8), torch.ones(8, 8)
    now = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for first in range(3):
            selected = table.select(torch.arange(first, first + 10))
            table(slots, weights, None, selected)[0].sum().backward()
            clip_row_gradients([selected], 1.0, None)
            optimizer.step(selected)
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_the_memory_of_a_step_does_not_grow_with_the_table() -> None:
    small, large = peak_of_a_step(1 << 8), peak_of_a_step(1 << 16)
    assert small == large, "bytes at 256 and at 65,536 slots"
    assert small > 10 * 16 * 4, "the measure sees the gradient at least"


def check_clipping(table: ValueTable) -> None:
    """The norm is that of all selected rows of all ranks, each once."""
    ids = torch.arange(0, N, 2)
    start, stop = table.row_range
    here = (ids >= start) & (ids < stop)
    gradient = torch.randn(
        len(ids), V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    selected = table.select(ids[here] - start)
    for max_norm in (math.inf, 100.0, 0.5):
        selected.values.grad = gradient[here].clone()
        norm = clip_row_gradients([selected], max_norm, table.group)
        whole = torch.nn.Parameter(gradient.clone())
        whole.grad = gradient.clone()
        expected = torch.nn.utils.clip_grad_norm_([whole], max_norm)
        torch.testing.assert_close(norm, expected, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(
            selected.gradient, whole.grad[here], rtol=TOLERANCE, atol=TOLERANCE
        )


def learn(table: ValueTable, optimizer: RowOptimizer, steps: range) -> None:
    """Steps on a global batch that is split over all ranks, with a loss of half the square."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, stop = table.row_range
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        slots = torch.randint(N, (T, K), generator=generator).tensor_split(ranks)[rank]
        weights = torch.randn(T, K, dtype=torch.float64, generator=generator)
        weights = weights.tensor_split(ranks)[rank]
        ids = selected_ids(step)
        selected = table.select(ids[(ids >= start) & (ids < stop)] - start)
        for micro_batch in (slice(0, 2), slice(2, None)):
            output, _ = table(slots[micro_batch], weights[micro_batch], None, selected)
            output.backward(output.detach())
        table.reduce_replica_gradients(selected)
        optimizer.step(selected)


def snapshot(table: ValueTable, optimizer: RowOptimizer) -> dict[str, Any]:
    values = table.local_values().clone()
    return {"values": values, "range": table.row_range, "state": optimizer.state_tensors()}


def learn_and_resume(
    rank: int, world_size: int, halfway: dict[str, Any], hsdp: bool = False
) -> dict[str, Any]:
    """Ten steps; five of them; and five, resumed from another run's first five."""
    mesh = None
    if world_size > 1:
        shape, names = ((2, 2), ("dp_replicate", "fsdp")) if hsdp else ((world_size,), ("fsdp",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    check_clipping(make_table(mesh=mesh))
    results = {}
    for name, build in BUILDS.items():
        table = make_table(mesh=mesh)
        optimizer = build(table)
        learn(table, optimizer, range(5))
        half = snapshot(table, optimizer)
        learn(table, optimizer, range(5, 10))
        whole = snapshot(table, optimizer)
        table = make_table(mesh=mesh, values=halfway[name]["values"])
        optimizer = build(table)
        learn(table, optimizer, range(20, 24))  # other rows: what is there before is replaced
        with torch.no_grad():
            start, stop = table.row_range
            table.local_values().copy_(halfway[name]["values"][start:stop])
        optimizer.load_state_tensors(halfway[name]["parts"])
        loaded = snapshot(table, optimizer)
        learn(table, optimizer, range(5, 10))
        results[name] = {
            "half": half,
            "whole": whole,
            "loaded": loaded,
            "resumed": snapshot(table, optimizer),
        }
    return results


def assembled(snapshots: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole table and state from those of all ranks; replicas are equal bit for bit."""
    parts: dict[tuple[int, int], dict[str, Any]] = {}
    for part in snapshots:
        twin = parts.setdefault(part["range"], part)
        assert torch.equal(part["values"], twin["values"])
        assert all(torch.equal(part["state"][key], twin["state"][key]) for key in part["state"])
    in_order = [parts[key] for key in sorted(parts)]
    states = [part["state"] for part in in_order]
    return {
        "values": torch.cat([part["values"] for part in in_order]),
        "state": {key: torch.cat([state[key] for state in states]) for key in states[0]},
        "parts": [part["state"] for part in snapshots],
    }


def test_any_number_of_ranks_learns_the_same_and_goes_on_from_any_other() -> None:
    reference: dict[str, dict[str, Any]] = {}
    halfway = {}
    for name, build in BUILDS.items():
        table = make_table()
        optimizer = build(table)
        learn(table, optimizer, range(5))
        halfway[name] = assembled([snapshot(table, optimizer)])
        learn(table, optimizer, range(5, 10))
        reference[name] = assembled([snapshot(table, optimizer)])
    for world_size, hsdp in ((4, True), (3, False), (2, False), (4, False), (1, False)):
        results = run_on_ranks(learn_and_resume, world_size, halfway, hsdp)
        for name in BUILDS:
            found = {
                when: assembled([result[name][when] for result in results])
                for when in ("half", "whole", "loaded", "resumed")
            }
            loaded = found["loaded"]["state"]
            assert loaded.keys() == halfway[name]["state"].keys()
            for key, tensor in halfway[name]["state"].items():
                assert torch.equal(loaded[key], tensor), f"{name} {key}: bit for bit"
            for when in ("whole", "resumed"):
                for part in ("values", "state"):
                    torch.testing.assert_close(
                        found[when][part], reference[name][part], rtol=TOLERANCE, atol=TOLERANCE
                    )
            halfway[name] = found["half"]
