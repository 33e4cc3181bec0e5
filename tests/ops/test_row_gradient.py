"""Bags of rows and the gradients over touched rows equal autograd through a dense table."""

import pytest
import torch
from torch import Tensor

from titan_smf.ops.embedding_bag import bag_of_entry, weight_gradient, weighted_bags
from titan_smf.ops.row_gradient import (
    FILTER_SIZE,
    dense_row_gradient,
    row_gradient,
    selected_entries,
    selected_row_gradient,
)

R, V = 13, 5
SIZES = torch.tensor([3, 1, 4, 0, 6])
"""Entries per bag, one of them empty."""


def make_entries(dtype: torch.dtype, index_dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = torch.randint(R - 3, (int(SIZES.sum()),)).to(index_dtype)
    rows[1] = rows[0]  # twice in one bag
    return {
        "table": torch.randn(R, V).to(dtype),
        "rows": rows,
        "offsets": (SIZES.cumsum(0) - SIZES).to(index_dtype),
        "weights": torch.randn(len(rows)).to(dtype),
        "grad_out": torch.randn(len(SIZES), V).to(dtype),
    }


def dense_bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    bags = torch.arange(len(SIZES)).repeat_interleave(SIZES)
    entries = weights.unsqueeze(1) * table[rows.long()]
    return torch.zeros(len(SIZES), V, dtype=table.dtype).index_add(0, bags, entries)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1)],
)
def test_bags_and_gradients_equal_autograd(
    dtype: torch.dtype, tolerance: float, index_dtype: torch.dtype
) -> None:
    case = make_entries(dtype, index_dtype)
    rows, offsets, weights = case["rows"], case["offsets"], case["weights"]
    table = case["table"].double().requires_grad_()
    exact_weights = weights.double().requires_grad_()
    exact = dense_bags(table, rows, exact_weights)
    exact.backward(case["grad_out"].double())
    assert table.grad is not None

    def assert_close(actual: Tensor, expected: Tensor | None) -> None:
        assert expected is not None
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)

    assert_close(weighted_bags(case["table"], rows, offsets, weights), exact)
    of_weights = weight_gradient(case["table"], rows, offsets, case["grad_out"])
    assert_close(of_weights, exact_weights.grad)
    entries = rows, bag_of_entry(offsets, len(rows)), weights, case["grad_out"]
    assert_close(dense_row_gradient(*entries, R), table.grad)
    touched, gradient = row_gradient(*entries)
    assert touched.tolist() == sorted(set(rows.tolist())), "every row that was read, no other"
    assert_close(gradient, table.grad[touched])
    entries = rows, offsets, weights, case["grad_out"]
    for selected in (torch.tensor([0, 4, 5, R - 1]), torch.arange(R), torch.arange(0)):
        assert_close(selected_row_gradient(selected, *entries), table.grad[selected])


def test_nothing_read_gives_empty_gradients() -> None:
    for table in (torch.randn(R, V), torch.randn(0, V)):
        none = torch.empty(0, dtype=torch.int32)
        bags = weighted_bags(table, none, none, torch.empty(0))
        assert bags.shape == (0, V)
        assert weight_gradient(table, none, none, bags).shape == (0,)
        touched, gradient = row_gradient(none, none, torch.empty(0), bags)
        assert (touched.shape, gradient.shape) == ((0,), (0, V))
        dense = dense_row_gradient(none, none, torch.empty(0), bags, len(table))
        assert torch.equal(dense, torch.zeros_like(table))
        selected = torch.arange(len(table))
        gradient = selected_row_gradient(selected, none, none, torch.empty(0), bags)
        assert torch.equal(gradient, torch.zeros_like(table))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_selected_entries_are_all_and_only_those(dtype: torch.dtype) -> None:
    """Also where ids of other rows, or of selected ones, agree in the lowest bits."""
    torch.manual_seed(0)
    rows = torch.randint(1 << 12, (5000,)).to(dtype)
    for selected in (
        rows[:3].long().unique(),
        rows.long().unique()[::7].contiguous(),
        torch.arange(8) * FILTER_SIZE * 8,  # all on one place of the filter
        torch.tensor([0, (1 << 12) + 5]),
        torch.arange(1 << 12),
    ):
        entry, position = selected_entries(selected, rows)
        assert torch.equal(entry, torch.isin(rows, selected.to(dtype)).nonzero().squeeze(1))
        assert torch.equal(selected[position], rows[entry].long())


def test_bfloat16_bags_are_summed_in_float32() -> None:
    ones = torch.ones(1, V, dtype=torch.bfloat16)
    rows = torch.zeros(1000, dtype=torch.int32)
    weights = torch.ones(1000, dtype=torch.bfloat16)  # 1 + 1 + ... in bfloat16 ends at 256
    output = weighted_bags(ones, rows, rows[:1], weights)
    assert (output == 1000).all()
    _, gradient = row_gradient(rows, rows, weights, ones)
    assert (gradient == 1000).all()


def test_entries_of_a_row_are_added_in_their_order() -> None:
    """So that the gradient of a row does not depend on what happened to other rows."""
    rows, bags = torch.tensor([1, 0, 1, 1]), torch.arange(4)
    grad_out = torch.tensor([[1.0], [5.0], [2.0**-24], [2.0**-24]])
    expected = torch.tensor([[5.0], [1.0]])  # (1 + e) + e; e + e + 1 would be above 1
    assert torch.equal(row_gradient(rows, bags, torch.ones(4), grad_out)[1], expected)
