"""The gradient of a table of rows, for the rows that were read and no others.

    M entries, B bags, R rows here, U distinct rows, V value dim

If `output[b] = sum_m weights[m] * table[rows[m]]` over the entries m of bag b, the gradient of row
r is `sum_m weights[m] * grad_out[bags[m]]` over the entries m that read r: again weighted bags,
with the roles exchanged. Sort the entries by row; each distinct row is a bag of rows of grad_out.
Nothing of size M x V or R x V is made.
"""

import torch
from torch import Tensor

from titan_smf.ops.embedding_bag import weighted_bags


def row_gradient(
    rows: Tensor, bags: Tensor, weights: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the distinct rows in ascending order, (U,) int64, and their gradients, (U, V).

    The sort is stable: a row's entries are summed in the order in which they came.

    Args:
        rows: (M,) the row each entry read, int32 (sorts twice as fast) or int64.
        bags: (M,) the bag each entry went to.
        weights: (M,) converted to the dtype of grad_out.
        grad_out: (B, V).
    """
    sorted_rows, order = rows.sort(stable=True)
    touched, counts = torch.unique_consecutive(sorted_rows, return_counts=True)
    offsets = (counts.cumsum(0) - counts).to(bags.dtype)
    gradient = weighted_bags(grad_out, bags[order], offsets, weights[order])
    return touched.long(), gradient


def dense_gradient(touched: Tensor, gradient: Tensor, num_rows: int) -> Tensor:
    """Returns the (num_rows, V) gradient that optimizers over the whole table ask for."""
    dense = gradient.new_zeros(num_rows, gradient.shape[1])
    return dense.index_copy_(0, touched, gradient)
