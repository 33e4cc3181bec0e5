"""Weighted sums of table rows and the gradient of their weights, without a copy of the rows.

    M entries, B bags, R rows here, V value dim

A bag is a run of consecutive entries; an entry is a row of the table and a weight. Both functions
read each entry's row once and write no (M, V) tensor. Torch's own kernels do it at memory speed in
float32 and bfloat16 (bfloat16 sums are kept in float32).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_bags(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Return `output[b] = sum of weights[m] * table[rows[m]] over the entries m of bag b`, (B, V).

    Args:
        table: (R, V); its dtype is the output's.
        rows: (M,), int32 or int64.
        offsets: (B,), of the rows' dtype: the first entry of each bag.
        weights: (M,), converted to the table's dtype.
    """
    if rows.numel() == 0:  # a table without rows is refused even then
        return table.new_zeros(offsets.shape[0], table.shape[1])
    weights = weights.to(table.dtype)
    return F.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights)


def weight_gradient(table: Tensor, rows: Tensor, offsets: Tensor, bag_gradient: Tensor) -> Tensor:
    """Return `gradient[m] = <bag_gradient[bag of m], table[rows[m]]>`, (M,), in the table's dtype.

    Args:
        table, rows, offsets: as in `weighted_bags`.
        bag_gradient: (B, V), of the table's dtype.
    """
    if rows.numel() == 0:
        return table.new_zeros(0)
    mode_sum = 0
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        bag_gradient, table, rows, offsets, bag_of_entry(offsets, rows.shape[0]), mode_sum
    )


def bag_of_entry(offsets: Tensor, num_entries: int) -> Tensor:
    """Return the bag of each entry, (M,), in the dtype of `offsets` (B,): [0, 2] and 3 entries
    give [0, 0, 1]."""
    bags = torch.arange(offsets.shape[0], device=offsets.device, dtype=offsets.dtype)
    end = offsets.new_full((1,), num_entries)
    sizes = torch.diff(offsets, append=end)
    return bags.repeat_interleave(sizes, output_size=num_entries)
