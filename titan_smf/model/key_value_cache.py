"""A key-value cache for generation: each further token costs one position, not all of them.

    B sequences, S new tokens of each, C capacity, H heads, D model, E head dim

Sequences differ in length. They are aligned at their first tokens, the shorter ones padded behind:

    prompts    a b c d    lengths 4    next token at position 4
               e f . .            2                           2

so every token has its true position, and padding is never seen: keys behind a sequence's end are
masked until a real token takes their place. A sequence's output therefore does not depend on the
other sequences of its batch, up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """Keys and values of all blocks for a batch. The model's first call reads the prompts, each
    later call one token a sequence; `MemoryLlama.forward` takes it.

    Args:
        lengths: (B,) tokens of each prompt, at least one, on the model's device.
        capacity: C, positions that the longest sequence will have at most.
    """

    def __init__(self, lengths: Tensor, capacity: int) -> None:
        self.capacity = capacity
        self._lengths = torch.zeros_like(lengths)
        self._new = lengths
        self._filled = 0  # no sequence is longer; known without asking the device
        self._positions = self._visible = lengths
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def read(self, num_tokens: int) -> Tensor:
        """Begin a call with (B, S) tokens; return their positions, (B, S)."""
        self._filled += num_tokens
        assert self._filled <= self.capacity, "as many positions as were asked for"
        device = self._lengths.device
        self._positions = self._lengths[:, None] + torch.arange(num_tokens, device=device)
        seen = torch.arange(self._filled, device=device)
        self._visible = (seen <= self._positions[..., None])[:, None]  # B 1 S seen
        return self._positions

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Tensor:
        """Let the new tokens of a block attend to themselves and to what was read before.

        Args:
            q: (B, H, S, E), with k and v (B, key/value heads, S, E).

        Returns:
            (B, H, S, E).
        """
        if block not in self._blocks:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._blocks[block] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self._blocks[block]
        places = self._positions[:, None, :, None].expand_as(k)
        keys.scatter_(2, places, k)
        values.scatter_(2, places, v)
        keys, values = keys[:, :, : self._filled], values[:, :, : self._filled]
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self._visible, enable_gqa=enable_gqa
        )

    def last(self, h: Tensor) -> Tensor:
        """End a call; return each sequence's state at its last new token, (B, D) of (B, S, D)."""
        row = torch.arange(len(h), device=h.device)
        last = h[row, self._new - 1]
        self._lengths = self._lengths + self._new
        self._new = torch.ones_like(self._new)
        return last

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences only: (rows,) int64, ascending."""
        self._lengths, self._new = self._lengths[rows], self._new[rows]
        self._blocks = {
            block: (keys[rows], values[rows]) for block, (keys, values) in self._blocks.items()
        }
