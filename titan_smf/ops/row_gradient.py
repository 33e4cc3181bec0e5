"""The gradient of a table of rows from the entries that read them.

    M entries, B bags, R rows here, U distinct rows, V value dim

If `output[b] = sum_m weights[m] * table[rows[m]]` over the entries m of bag b, the gradient of row
r is `sum_m weights[m] * grad_out[bags[m]]` over the entries m that read r: again weighted bags,
with the roles exchanged. Sort the entries by row; each row is a bag of rows of grad_out. Nothing
of size M x V is made. The sort is stable: a row's entries are added in the order they came in.

Arguments of both functions: rows (M,), the row each entry read; bags (M,), the bag it went to;
weights (M,), converted to the dtype of grad_out; grad_out (B, V).
"""

import torch
from torch import Tensor

from titan_smf.ops.embedding_bag import weighted_bags


def row_gradient(
    rows: Tensor, bags: Tensor, weights: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the distinct rows in ascending order, (U,) int64, and their gradients, (U, V).

    Costs nothing for the rows of the table that were not read, however many they are.
    """
    sorted_rows, order = _sort(rows)
    touched, counts = torch.unique_consecutive(sorted_rows, return_counts=True)
    offsets = (counts.cumsum(0) - counts).to(bags.dtype)
    return touched.long(), weighted_bags(grad_out, bags[order], offsets, weights[order])


def dense_row_gradient(
    rows: Tensor, bags: Tensor, weights: Tensor, grad_out: Tensor, num_rows: int
) -> Tensor:
    """Returns the gradients of all rows, (R, V), for optimizers over the whole table.

    Written in one pass: a row that was not read is an empty bag.
    """
    order = _sort(rows)[1]
    counts = bags.new_zeros(num_rows).scatter_add_(0, rows.long(), torch.ones_like(bags))
    offsets = counts.cumsum(0, dtype=counts.dtype) - counts
    return weighted_bags(grad_out, bags[order], offsets, weights[order])


def _sort(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in ascending order and the entries they belong to; int32 sorts twice as fast."""
    return rows.to(torch.int32).sort(stable=True)
