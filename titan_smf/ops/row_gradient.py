"""The gradient of a table of rows from the entries that read them.

    M entries, B bags, R rows here, U distinct rows, S selected rows, V value dim

If `output[b] = sum_m weights[m] * table[rows[m]]` over the entries m of bag b, the gradient of row
r is `sum_m weights[m] * grad_out[bags[m]]` over the entries m that read r: again weighted bags,
with the roles exchanged. Sort the entries by row; each row is a bag of rows of grad_out. Nothing
of size M x V is made. The sort is stable: a row's entries are added in the order they came in.

Arguments of the gradients: rows (M,), the row each entry read; bags (M,), the bag it went to, or
offsets (B,), the first entry of each bag; weights (M,), converted to the dtype of grad_out;
grad_out (B, V).
"""

import torch
from torch import Tensor

from titan_smf.ops.embedding_bag import weighted_bags

FILTER_SIZE = 32
"""Entries of the filter per selected row, at least: 1 in 32 of the other entries passes it."""


def row_gradient(
    rows: Tensor, bags: Tensor, weights: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the distinct rows in ascending order, (U,) int64, and their gradients, (U, V).

    Costs nothing for the rows of the table that were not read, however many they are.
    """
    sorted_rows, order = _sort(rows)
    touched, counts = torch.unique_consecutive(sorted_rows, return_counts=True)
    offsets = (counts.cumsum(0) - counts).to(bags.dtype)
    return touched.long(), weighted_bags(grad_out, bags[order], offsets, weights[order])


def dense_row_gradient(
    rows: Tensor, bags: Tensor, weights: Tensor, grad_out: Tensor, num_rows: int
) -> Tensor:
    """Return the gradients of all rows, (R, V), for optimizers over the whole table.

    Written in one pass: a row that was not read is an empty bag.
    """
    order = _sort(rows)[1]
    counts = bags.new_zeros(num_rows).scatter_add_(0, rows.long(), torch.ones_like(bags))
    offsets = counts.cumsum(0, dtype=counts.dtype) - counts
    return weighted_bags(grad_out, bags[order], offsets, weights[order])


def selected_row_gradient(
    selected: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor, grad_out: Tensor
) -> Tensor:
    """Return the gradients of the rows `selected`, (S,) ascending, as (S, V); zero where not read.

    Entries of other rows cost a look at their id: nothing of size V is read or computed for them.
    """
    entry, position = selected_entries(selected, rows)
    bags = torch.searchsorted(offsets, entry.to(offsets.dtype), right=True) - 1
    return dense_row_gradient(position, bags, weights[entry], grad_out, selected.shape[0])


def selected_entries(selected: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries (M,) read one of the rows `selected` (S,), ascending, and which one:
    `rows[entry] == selected[position]`, both (number of such entries,), in the order of entries.

    A filter over the lowest bits of the ids, small enough for a processor's cache, dismisses
    nearly all other entries: 2 to 10 times as fast as a binary search for each.
    """
    if selected.shape[0] == 0:
        none = selected.new_empty(0)
        return none, none
    selected = selected.to(rows.dtype)
    size = 1 << (FILTER_SIZE * selected.shape[0] - 1).bit_length()
    passes = torch.zeros(size, dtype=torch.bool, device=rows.device)
    passes[(selected & (size - 1)).long()] = True
    entry = passes.index_select(0, rows & (size - 1)).nonzero().squeeze(1)
    wanted = rows[entry]
    position = torch.searchsorted(selected, wanted).clamp_(max=selected.shape[0] - 1)
    found = (selected[position] == wanted).nonzero().squeeze(1)
    return entry[found], position[found]


def _sort(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in ascending order and their entries; int32 sorts twice as fast."""
    return rows.to(torch.int32).sort(stable=True)
