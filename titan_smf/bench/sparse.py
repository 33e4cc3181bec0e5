"""Measures of a sparse step's work on the value table, against a dense gradient and optimizer.

T tokens, K slots per token, N slots, S selected rows, V value dim
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_smf.bench.measure import (
    ACCESS_KINDS,
    Measure,
    median_ratio,
    on_ranks,
    peak_growth,
    random_slots,
    update_rows,
)
from titan_smf.model.value_table import ValueTable
from titan_smf.ops.row_gradient import selected_row_gradient
from titan_smf.sparse.row_optimizer import RowAdamW, RowOptimizer, RowSGD

BuildOptimizer = Callable[[ValueTable], RowOptimizer]

OPTIMIZERS: dict[str, BuildOptimizer] = {
    "AdamW": lambda table: RowAdamW(table, lr=0.1, weight_decay=0.1),
    "SGD": lambda table: RowSGD(table, lr=2.0),
}
T, K, V = 1024, 32, 256
LARGE, SMALL = 1 << 20, 1 << 16


def sparse(runs: int) -> Iterator[Measure]:
    """Gradient, optimizer, both with the lookup, and memory."""
    yield from _selected_gradient(runs)
    yield from _optimizers(runs)
    yield from _value_parts(runs)
    yield from _memory()


def _selected_gradient(runs: int) -> Iterator[Measure]:
    values = torch.zeros(LARGE, V).requires_grad_()

    def dense() -> Tensor:
        gradient = torch.autograd.grad(output, values, grad_out, retain_graph=True)[0]
        return gradient.mul_(mask)

    def ours() -> Tensor:
        offsets = torch.arange(0, T * K, K)
        return selected_row_gradient(rows, slots.flatten(), offsets, weights.flatten(), grad_out)

    for kind in ACCESS_KINDS:
        slots = random_slots(kind, LARGE, T, K)
        weights, grad_out = torch.rand(T, K), torch.randn(T, V)
        rows = _most_accessed(slots, 500)
        mask = torch.zeros(LARGE, 1)
        mask[rows] = 1
        output = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)
        torch.testing.assert_close(dense()[rows], ours(), rtol=1e-4, atol=1e-4)
        share = torch.isin(slots, rows).float().mean()
        note = f"{T} tokens, {K} slots each, {share:.0%} of them selected, N 1M, v_dim {V}"
        name = f"gradient: dense, then a mask / ours for 500 selected rows, {kind}"
        yield Measure(name, median_ratio(dense, ours, runs), "40", note)


def _optimizers(runs: int) -> Iterator[Measure]:
    values = torch.zeros(LARGE, V).requires_grad_()
    values.grad = torch.ones_like(values)
    dense = torch.optim.AdamW([values], fused=True)
    ours = _row_updates(LARGE, 2000, OPTIMIZERS["AdamW"])
    ratio = median_ratio(dense.step, ours, runs)
    note = f"v_dim {V}; state for 16,000 rows"
    yield Measure("AdamW step: dense fused / ours for 2000 rows, N 1M", ratio, "80", note)
    for name, target in (("AdamW", "1.1"), ("SGD", "1.2")):
        large, small = (_row_updates(N, 2000, OPTIMIZERS[name]) for N in (LARGE, SMALL))
        ratio = median_ratio(large, small, runs)
        yield Measure(f"row {name} step: N 1M / N 64K, 2000 rows", ratio, target)


def _value_parts(runs: int) -> Iterator[Measure]:
    for kind, (optimizer, build) in itertools.product(ACCESS_KINDS, OPTIMIZERS.items()):
        large, small = (_value_part(N, kind, build) for N in (LARGE, SMALL))
        ratio = median_ratio(large, small, runs)
        name = f"value part of a step: N 1M / N 64K, {kind}, {optimizer}"
        yield Measure(name, ratio, "1.2", "lookup, gradient and step of 500 rows")


def _memory() -> Iterator[Measure]:
    (dense,) = on_ranks(_peak_of_dense_step, 1)
    for num_rows in (500, 2000):
        (ours,) = on_ranks(_peak_of_row_steps, 1, num_rows)
        note = f"AdamW, {dense >> 20} MiB / {ours / 2**20:.1f} MiB"
        name = f"extra peak memory of a step: dense / {num_rows} rows, N 1M"
        yield Measure(name, dense / ours, "100", note)


def _row_updates(num_slots: int, num_rows: int, build: BuildOptimizer) -> Callable[[], None]:
    """Return a function that updates rows, others at each call, all of which have state."""
    table = _table(num_slots)
    optimizer = build(table)
    gradient = torch.randn(num_rows, V)
    selections = [torch.randperm(num_slots)[:num_rows].sort().values for _ in range(8)]
    rows = itertools.cycle(selections)

    def step() -> None:
        selected = table.select(next(rows))
        selected.values.grad = gradient
        optimizer.step(selected)

    for _ in selections:
        step()
    return step


def _value_part(num_slots: int, kind: str, build: BuildOptimizer) -> Callable[[], None]:
    """Return a function that looks up, and computes the gradient of 500 rows and updates them."""
    table = _table(num_slots)
    optimizer = build(table)
    slots, weights = random_slots(kind, num_slots, T, K), torch.rand(T, K)
    rows, grad_out = _most_accessed(slots, 500), torch.randn(T, V) * 1e-3

    def step() -> None:
        selected = table.select(rows)
        table(slots, weights, None, selected)[0].backward(grad_out)
        optimizer.step(selected)

    return step


def _table(num_slots: int) -> ValueTable:
    table = ValueTable(num_slots, V)
    table.init_weights(seed=0)
    table.values.requires_grad_(False)
    return table


def _most_accessed(slots: Tensor, number: int) -> Tensor:
    rows, counts = slots.unique(return_counts=True)
    return rows[counts.topk(number).indices].sort().values


def _peak_of_dense_step(rank: int) -> int:
    table = ValueTable(LARGE, V)
    table.init_weights(seed=0)
    optimizer = torch.optim.AdamW([table.values], fused=True)
    slots, weights = random_slots("uniform", LARGE, T, K), torch.rand(T, K)
    rows = _most_accessed(slots, 500)

    def step() -> None:
        table(slots, weights)[0].sum().backward()
        update_rows(optimizer, table.values, rows)

    return peak_growth(step)


def _peak_of_row_steps(rank: int, num_rows: int) -> int:
    _row_steps(num_slots=64, tokens=8, num_rows=2)()  # loads what the first use loads
    return peak_growth(_row_steps(LARGE, T, num_rows))


def _row_steps(num_slots: int, tokens: int, num_rows: int) -> Callable[[], None]:
    """Return a function that makes four steps, each of other rows."""
    table = _table(num_slots)
    optimizer = OPTIMIZERS["AdamW"](table)
    slots, weights = random_slots("uniform", num_slots, tokens, K), torch.rand(tokens, K)

    def steps() -> None:
        for part in slots.split(tokens // 4):
            selected = table.select(_most_accessed(part, num_rows))
            table(slots, weights, None, selected)[0].sum().backward()
            optimizer.step(selected)

    return steps
