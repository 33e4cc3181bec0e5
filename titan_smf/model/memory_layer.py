"""The product-key memory layer that stands in the place of a Transformer block's FFN.

    B batch, S sequence, T tokens, D model, H heads, K slots per token (H * k), N slots, V value dim

                     x (T, D)
         query: D -> H * k_dim |                     | gate: D -> V
    product-key search, softmax |                    |
          weighted sum of values y (T, V) -- * silu -|
                                 | output: V -> D

Large Memory Layers with Product Keys (arXiv 1907.05242); gate and query/key normalisation as in
Memory Layers at Scale (arXiv 2412.09764).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.ops.product_key import product_key_topk

NORM_EPS = 1e-6
"""Far below the mean square of fresh keys (6.5e-4 at k_dim 512); bfloat16's own eps is not."""


class MemoryLayer(nn.Module):
    """`out = (y * silu(x W1)) W2`, `y = sum over heads and k slots of softmax(score) V[slot]`.

    The slots of a head are the k best of N = n_keys**2 by `q1 . key1[i] + q2 . key2[j]`, with slot
    id `i * n_keys + j`. The values belong to a `ValueTable` that is handed to `forward`.

    Args:
        dim: D.
        n_keys: half-keys per head and half.
        heads: H.
        k: slots retrieved per head, at most n_keys.
        k_dim: size of a query, even.
        v_dim: V.
        qk_norm: give query halves and half-keys unit root mean square (with a learnable gain on
            the query's), and divide scores by sqrt(k_dim / 2). Otherwise plain dot products.
    """

    def __init__(
        self, dim: int, n_keys: int, heads: int, k: int, k_dim: int, v_dim: int, qk_norm: bool
    ) -> None:
        super().__init__()
        assert k <= n_keys, "a half must have k keys to retrieve"
        assert k_dim % 2 == 0, "a query has two halves"
        self.n_keys = n_keys
        self.heads = heads
        self.k = k
        self.k_dim = k_dim
        self.query = nn.Linear(dim, heads * k_dim, bias=False)
        self.keys = nn.Parameter(torch.empty(2 * heads * n_keys, k_dim // 2))
        self.query_gain = nn.Parameter(torch.empty(2, k_dim // 2)) if qk_norm else None
        self.gate = nn.Linear(dim, v_dim, bias=False)
        self.output = nn.Linear(v_dim, dim, bias=False)

    def init_weights(self, init_std: float) -> None:
        """Draw all parameters from torch's global generator.

        Keys U(-k_dim**-0.5, +k_dim**-0.5) as in the reference, gains 1, linear maps truncated
        normal of std 0.02, the last one of `init_std`.
        """
        nn.init.uniform_(self.keys, -(self.k_dim**-0.5), self.k_dim**-0.5)
        if self.query_gain is not None:
            nn.init.ones_(self.query_gain)
        nn.init.trunc_normal_(self.query.weight, std=0.02)
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.trunc_normal_(self.output.weight, std=init_std)

    def address(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots (T, K) int64 that tokens x (..., D) read, and their weights (T, K).

        A token's K slots are its heads' k slots one after another; a slot may occur in several
        heads. Weights sum to 1 per head, computed in at least float32, in the activations' dtype.
        """
        half = self.k_dim // 2
        query = self.query(x.reshape(-1, x.shape[-1]))  # (T, H * k_dim)
        dtype = query.dtype
        query = query.view(-1, self.heads, 2, half)
        keys = self.keys.view(2, self.heads, self.n_keys, half)
        if self.query_gain is not None:
            query = F.rms_norm(query, (half,), eps=NORM_EPS) * (self.query_gain / math.sqrt(half))
            keys = F.rms_norm(keys, (half,), eps=NORM_EPS)
        scores, slots = product_key_topk(
            query.to(dtype).view(-1, self.heads, self.k_dim), keys.to(dtype), self.k
        )
        return slots.flatten(1), scores.softmax(-1).to(dtype).flatten(1)

    def forward(
        self,
        x: Tensor,
        table: ValueTable,
        counted: Tensor | None = None,
        selected: SelectedRows | None = None,
        addresses: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output (B, S, D) and the accesses of this rank's rows of the table.

        Args:
            x: (B, S, D), normed.
            table: holds the N values; every rank of its group calls forward together.
            counted: (B, S) bool, false for padding, which does not appear in the accesses.
            selected: the only rows of the table that get a gradient; None for all.
            addresses: what `address` returned for x, if it was called before.
        """
        assert table.num_slots == self.n_keys**2, "a slot for every pair of half-keys"
        slots, weights = self.address(x) if addresses is None else addresses
        counted = None if counted is None else counted.flatten()
        y, accesses = table(slots, weights, counted, selected)
        y = y.view(*x.shape[:-1], -1)
        return self.output(y * F.silu(self.gate(x))), accesses
