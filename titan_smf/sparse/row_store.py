"""Tensors for a few rows of a large table, found by row id.

    C rows stored, S rows asked for, n of them new, V value dim

Memory and time depend on C and S, never on the size of the table. A row keeps the place in the
tensors that it gets at first. To find it, one sorted array of 64-bit keys holds the row's id in the
high bits and its place in the low ones: S rows are found in O(S log C); adding rows copies the
8 C bytes of the keys (0.2 ms at 100K rows) and no tensor. Tensors grow by half when they are full.
"""

import torch
from torch import Tensor

PLACE_BITS = 31
GROWTH = 1.5


class RowStore:
    """Named tensors with an entry for each row that was ever put into it.

    Args:
        fields: shape and dtype of an entry, by name.
        device: of all tensors.
    """

    def __init__(
        self, fields: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
    ) -> None:
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        """(C,) ascending: id << PLACE_BITS | place."""
        self.tensors = {
            name: torch.empty(0, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in fields.items()
        }
        """(at least C, ...) by place."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self) -> Tensor:
        """Return the ids of all rows, (C,) int64, ascending."""
        return self.keys >> PLACE_BITS

    def in_order(self, name: str) -> Tensor:
        """Return a copy of a field, (C, ...), in the order of `rows()`."""
        return self.tensors[name][self._place(self.keys)]

    def put(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places (S,) of `rows`, (S,) int64 ascending and distinct, and a mask (S,) of
        those that were not here before: these are added with zeros in all fields."""
        wanted = rows << PLACE_BITS
        found = self._next_key(wanted)
        is_new = found >> PLACE_BITS != rows
        if is_new.any():
            self._add(wanted[is_new])
            found = self._next_key(wanted)
        return self._place(found), is_new

    def _add(self, keys: Tensor) -> None:
        """Add rows by their keys (n,) without places."""
        before, after = len(self), len(self) + len(keys)
        new = torch.arange(len(keys), device=keys.device)
        target = torch.searchsorted(self.keys, keys) + new
        is_old = torch.ones(after, dtype=torch.bool, device=keys.device)
        is_old[target] = False
        self.keys = self.keys.new_empty(after).masked_scatter_(is_old, self.keys)
        self.keys[target] = keys | (before + new)
        for name, tensor in self.tensors.items():
            if after > len(tensor):
                room = max(after, int(len(tensor) * GROWTH))
                self.tensors[name] = tensor.new_zeros(room, *tensor.shape[1:])
                self.tensors[name][:before] = tensor[:before]

    def _next_key(self, wanted: Tensor) -> Tensor:
        """Return for each key the first stored one that is not below it; if there is none, any."""
        if not len(self):
            return torch.full_like(wanted, -1)
        return self.keys[torch.searchsorted(self.keys, wanted).clamp_(max=len(self) - 1)]

    def _place(self, keys: Tensor) -> Tensor:
        return keys & ((1 << PLACE_BITS) - 1)
