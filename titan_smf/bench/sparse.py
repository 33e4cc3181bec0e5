"""Measures of a sparse step's work on the value table, against a dense gradient and optimizer.

T tokens, K slots per token, N slots, S selected rows, V value dim
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_smf.bench.measure import Measure, median_ratio, on_ranks, peak_growth, random_slots
from titan_smf.model.value_table import ValueTable
from titan_smf.ops.row_gradient import selected_row_gradient
from titan_smf.sparse.row_optimizer import RowAdamW, RowOptimizer, RowSGD

KINDS = ("uniform", "zipf")
OPTIMIZERS: dict[str, Callable[[ValueTable], RowOptimizer]] = {
    "AdamW": lambda table: RowAdamW(table, lr=0.1, weight_decay=0.1),
    "SGD": lambda table: RowSGD(table, lr=2.0),
}
T, K, V = 1024, 32, 256
LARGE, SMALL = 1 << 20, 1 << 16


def sparse(runs: int) -> list[Measure]:
    """Gradient, optimizer, both with the lookup, and memory."""
    return [
        *_selected_gradient(runs),
        *_optimizer_against_dense(runs),
        *_optimizer_growth(runs),
        *_step_growth(runs),
        *_memory(),
    ]


def _selected_gradient(runs: int) -> list[Measure]:
    values = torch.zeros(LARGE, V).requires_grad_()
    measures = []
    for kind in KINDS:
        slots = random_slots(kind, LARGE, T, K)
        weights, grad_out = torch.rand(T, K), torch.randn(T, V)
        rows = _most_accessed(slots, 500)
        mask = torch.zeros(LARGE, 1)
        mask[rows] = 1
        output = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)

        def dense(
            output: Tensor = output, grad_out: Tensor = grad_out, mask: Tensor = mask
        ) -> Tensor:
            gradient = torch.autograd.grad(output, values, grad_out, retain_graph=True)[0]
            return gradient.mul_(mask)

        def ours(
            slots: Tensor = slots,
            weights: Tensor = weights,
            grad_out: Tensor = grad_out,
            rows: Tensor = rows,
        ) -> Tensor:
            offsets = torch.arange(0, T * K, K)
            return selected_row_gradient(
                rows, slots.flatten(), offsets, weights.flatten(), grad_out
            )

        torch.testing.assert_close(dense()[rows], ours(), rtol=1e-4, atol=1e-4)
        share = torch.isin(slots, rows).float().mean()
        note = f"{T} tokens, {K} slots each, {share:.0%} of them selected, N 1M, v_dim {V}"
        name = f"gradient: dense, then a mask / ours for 500 selected rows, {kind}"
        measures.append(Measure(name, median_ratio(dense, ours, runs), "40", note))
    return measures


def _optimizer_against_dense(runs: int) -> list[Measure]:
    values = torch.zeros(LARGE, V).requires_grad_()
    values.grad = torch.ones_like(values)
    dense = torch.optim.AdamW([values], fused=True)
    ours = _steps(LARGE, 2000, OPTIMIZERS["AdamW"])
    ratio = median_ratio(dense.step, ours, runs)
    note = f"v_dim {V}; state for 16,000 rows"
    return [Measure("AdamW step: dense fused / ours for 2000 rows, N 1M", ratio, "80", note)]


def _optimizer_growth(runs: int) -> list[Measure]:
    measures = []
    for name, target in (("AdamW", "1.1"), ("SGD", "1.2")):
        large, small = (_steps(N, 2000, OPTIMIZERS[name]) for N in (LARGE, SMALL))
        ratio = median_ratio(large, small, runs)
        measures.append(Measure(f"row {name} step: N 1M / N 64K, 2000 rows", ratio, target))
    return measures


def _step_growth(runs: int) -> list[Measure]:
    measures = []
    for kind, (name, optimizer) in itertools.product(KINDS, OPTIMIZERS.items()):
        large, small = (_value_part(N, kind, optimizer) for N in (LARGE, SMALL))
        ratio = median_ratio(large, small, runs)
        note = "lookup, gradient and step of 500 rows"
        measures.append(
            Measure(f"value part of a step: N 1M / N 64K, {kind}, {name}", ratio, "1.2", note)
        )
    return measures


def _memory() -> list[Measure]:
    dense = max(on_ranks(_peak_of_dense_step, 1))
    measures = []
    for num_rows in (500, 2000):
        ours = max(on_ranks(_peak_of_row_steps, 1, num_rows))
        note = f"AdamW, {dense >> 20} MiB / {ours / 2**20:.1f} MiB"
        name = f"extra peak memory of a step: dense / {num_rows} rows, N 1M"
        measures.append(Measure(name, dense / ours, "100", note))
    return measures


def _steps(
    num_slots: int, num_rows: int, build: Callable[[ValueTable], RowOptimizer]
) -> Callable[[], None]:
    """A function that selects and updates some rows, others at each call; their state exists."""
    table = _table(num_slots)
    optimizer = build(table)
    gradient = torch.randn(num_rows, V)
    choices = [torch.randperm(num_slots)[:num_rows].sort().values for _ in range(8)]
    rows = itertools.cycle(choices)

    def step() -> None:
        selected = table.select(next(rows))
        selected.values.grad = gradient
        optimizer.step(selected)

    for _ in choices:
        step()
    return step


def _value_part(
    num_slots: int, kind: str, build: Callable[[ValueTable], RowOptimizer]
) -> Callable[[], None]:
    """A function that makes a step of 500 rows: lookup, their gradient, update."""
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
    mask = torch.zeros(LARGE, 1)
    mask[_most_accessed(slots, 500)] = 1

    def step() -> None:
        table(slots, weights)[0].sum().backward()
        assert table.values.grad is not None
        table.values.grad.mul_(mask)
        optimizer.step()

    return peak_growth(step)


def _peak_of_row_steps(rank: int, num_rows: int) -> int:
    """Of four steps, each of other rows."""
    _row_steps(num_slots=64, tokens=8, num_rows=2)()  # loads what the first use loads
    return peak_growth(_row_steps(LARGE, T, num_rows))


def _row_steps(num_slots: int, tokens: int, num_rows: int) -> Callable[[], None]:
    table = _table(num_slots)
    optimizer = OPTIMIZERS["AdamW"](table)
    slots, weights = random_slots("uniform", num_slots, tokens, K), torch.rand(tokens, K)

    def steps() -> None:
        for part in slots.split(tokens // 4):
            selected = table.select(_most_accessed(part, num_rows))
            table(slots, weights, None, selected)[0].sum().backward()
            optimizer.step(selected)

    return steps
