"""A Llama in which the feed-forward of chosen layers is a product-key memory.

Blocks are torchtitan's. A memory block replaces the feed-forward by a `MemoryLayer`; the value
tables belong to the root module and are handed to the blocks that read them, so that one table
shared by several layers is one parameter with one name.

    tokens -> embedding -> block ... block -> memory block -> block ... -> norm -> output -> logits
                                                 |    ^
                                           slots v    | weighted values
                                               value table (rows split over the ranks)

Letters: B batch, S sequence, D model, H attention heads, N slots, K slots per token, V value dim.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_smf.model.args import MemoryLlamaArgs
from titan_smf.model.key_value_cache import KeyValueCache
from titan_smf.model.memory_layer import MemoryLayer
from titan_smf.model.names import is_adapter
from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.torchtitan_api import Attention, FeedForward, Transformer, TransformerBlock

Part = Literal["all", "to_memory", "from_memory"]


class SlotLookup(NamedTuple):
    """A memory layer's lookup before it reads a value: nothing after it depends on the query."""

    h: Tensor
    """(B, S, D), after the block's attention."""
    slots: Tensor
    """(T, K) int64."""
    weights: Tensor
    """(T, K)."""


def rotate(x_BSHE: Tensor, freqs_cis: Tensor) -> Tensor:
    """Apply rotary embeddings in the precision of `x`, at least float32; shape and dtype stay.

    `freqs_cis` holds the factors of each position, (S, E / 2) or (B, S, E / 2).
    """
    wide = torch.promote_types(x_BSHE.dtype, torch.float32)
    pairs = torch.view_as_complex(x_BSHE.to(wide).unflatten(-1, (-1, 2)))
    rotated = pairs * freqs_cis.unsqueeze(-2)
    return torch.view_as_real(rotated).flatten(-2).to(x_BSHE.dtype)


class LlamaAttention(Attention):
    """torchtitan's attention with a cache, and rotary embeddings that keep float64 as float64."""

    def __init__(self, layer_id: int, args: MemoryLlamaArgs) -> None:
        super().__init__(args)
        self.layer_id = layer_id

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Any = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend causally, (B, S, D) -> (B, S, D); with flex attention within documents.

        With a cache, tokens also attend to what it holds, all of which is one document.
        """
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H S E
        if cache is not None:
            mixed = cache.attend(self.layer_id, q, k, v, self.enable_gqa)
        else:
            masks = {"block_mask": attention_masks} if self.attn_type == "flex" else {}
            mixed = self.inner_attention(q, k, v, enable_gqa=self.enable_gqa, **masks)
        return self.wo(mixed.transpose(1, 2).reshape(B, S, -1))


class LlamaBlock(TransformerBlock):
    """A pre-norm block with a SwiGLU feed-forward of exactly `ffn_dim`."""

    def __init__(self, layer_id: int, args: MemoryLlamaArgs) -> None:
        super().__init__(layer_id, args)
        self.attention = LlamaAttention(layer_id, args)
        # FeedForward takes two thirds of what it is given.
        self.feed_forward = FeedForward(args.dim, (3 * args.ffn_dim + 1) // 2, 1, None)


class MemoryBlock(TransformerBlock):
    """A pre-norm block whose feed-forward is a memory layer."""

    def __init__(self, layer_id: int, args: MemoryLlamaArgs) -> None:
        super().__init__(layer_id, args)
        memory = args.memory
        self.attention = LlamaAttention(layer_id, args)
        del self.feed_forward
        sizes = memory.n_keys, memory.heads, memory.k, memory.k_dim, memory.v_dim
        self.memory = MemoryLayer(args.dim, *sizes, memory.qk_norm)

    def forward(  # type: ignore[override]
        self,
        x: Tensor | SlotLookup,
        freqs_cis: Tensor,
        attention_masks: Any,
        table: ValueTable,
        counted: Tensor | None,
        selected: SelectedRows | None,
        only_count: bool,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor, SlotLookup]:
        """Return the output (B, S, D), the accesses of this rank's rows, and the lookup made.

        Given a lookup instead of (B, S, D), go on from there. With `only_count` no value is read,
        and the output means nothing.
        """
        if isinstance(x, SlotLookup):
            lookup = x
            normed = self.ffn_norm(lookup.h)
        else:
            h = x + self.attention(self.attention_norm(x), freqs_cis, attention_masks, cache)
            normed = self.ffn_norm(h)
            lookup = SlotLookup(h, *self.memory.address(normed))
        h, slots, weights = lookup
        if only_count:
            return h, table.count(slots, None if counted is None else counted.flatten()), lookup
        out, accesses = self.memory(normed, table, counted, selected, (slots, weights))
        return h + out, accesses, lookup

    def init_weights(self) -> None:
        """Initialise all but the values, from torch's global generator."""
        for norm in (self.attention_norm, self.ffn_norm):
            norm.reset_parameters()
        self.attention.init_weights(self.weight_init_std)
        self.memory.init_weights(self.weight_init_std)


class MemoryLlama(Transformer):
    """The whole model. With `args.memory.layers == []` it is a plain dense Llama."""

    model_args: MemoryLlamaArgs

    def __init__(self, args: MemoryLlamaArgs) -> None:
        # The parent builds plain blocks for `n_layers`; ours are built here instead.
        super().__init__(dataclasses.replace(args, n_layers=0))
        self.model_args = args
        self.n_layers = args.n_layers
        for layer in range(args.n_layers):
            self.layers[str(layer)] = _new_block(layer, args)
        memory = args.memory
        dtype = getattr(torch, memory.value_dtype)
        self.tables = nn.ModuleList(
            ValueTable(memory.num_slots, memory.v_dim, dtype) for _ in range(memory.num_tables)
        )

    def value_tables(self) -> Iterator[ValueTable]:
        """Yield the tables: one for all memory layers, or one each in the layers' order."""
        for table in self.tables:
            assert isinstance(table, ValueTable)
            yield table

    def forward(
        self,
        tokens: Tensor | SlotLookup,
        attention_masks: Any = None,
        counted: Tensor | None = None,
        part: Part = "all",
        selected: Sequence[SelectedRows] | None = None,
        observe: Callable[[SlotLookup], None] | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor | SlotLookup, list[Tensor]]:
        """Compute logits, and the accesses of this rank's rows of the tables.

        Args:
            tokens: (B, S) token ids; for "from_memory" the lookup that "to_memory" returned.
            attention_masks: flex attention's block mask, or None for causal attention.
            counted: (B, S) bool, the tokens whose accesses are reported; None means all.
            part: "all"; "to_memory" ends with the slots of the last memory layer and reads no
                value there; "from_memory" goes on from the lookup of the first memory layer.
            selected: for each table the rows that get a gradient; None for all.
            observe: called with this rank's lookup of each memory layer, in the layers' order.
            cache: what the sequences have read before; the tokens are added to it.

        Returns:
            logits (B, S, vocabulary); with a cache those after each sequence's last token,
            (B, vocabulary); for "to_memory" the lookup of the first memory layer instead. And for
            each memory layer in order the rows of this rank's part of its table that counted tokens
            of all ranks of the shard group accessed.
        """
        layers = self.model_args.memory.layers
        h = tokens if isinstance(tokens, SlotLookup) else self.tok_embeddings(tokens)
        S = (tokens.h if isinstance(tokens, SlotLookup) else tokens).shape[1]
        freqs_cis = self.freqs_cis[:S] if cache is None else self.freqs_cis[cache.read(S)]
        first: SlotLookup | None = None
        accesses: list[Tensor] = []
        for name, block in self.layers.items():
            if int(name) not in layers:
                if part != "from_memory" or accesses:
                    # torchtitan's block hands its last argument, "positions", to the attention.
                    h = block(h, freqs_cis, attention_masks, cache)
                continue
            index = len(accesses) % len(self.tables)
            ends = part == "to_memory" and int(name) == max(layers)
            table, rows = self.tables[index], selected[index] if selected else None
            h, accessed, lookup = block(
                h, freqs_cis, attention_masks, table, counted, rows, ends, cache
            )
            accesses.append(accessed)
            if observe is not None:
                observe(lookup)
            if part == "to_memory":
                first = first or lookup
                if ends:
                    return first, accesses
        h = self.norm(h)
        return self.output(h if cache is None else cache.last(h)), accesses

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the initial weights; they depend on the seed alone, not on ranks or device.

        Each part is drawn whole on the CPU, with a seed of its own, and every rank keeps its
        shard: extra memory of one block or embedding at a time, no communication.
        """
        args = self.model_args
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        ends = Transformer(dataclasses.replace(args, n_layers=0, max_seq_len=1))
        _draw(ends, args.seed, 0)
        for name in ("tok_embeddings", "norm", "output"):
            copy_shards(getattr(ends, name).parameters(), getattr(self, name).parameters())
        del ends
        for layer in range(args.n_layers):
            block = _new_block(layer, args)
            _draw(block, args.seed, layer + 1)
            named = self.layers[str(layer)].named_parameters()
            copy_shards(block.parameters(), (p for name, p in named if not is_adapter(name)))
        for index, table in enumerate(self.value_tables()):
            table.init_weights(_seed_of(args.seed, args.n_layers + 1 + index))


def _new_block(layer: int, args: MemoryLlamaArgs) -> TransformerBlock:
    return (MemoryBlock if layer in args.memory.layers else LlamaBlock)(layer, args)


def _seed_of(seed: int, part: int) -> int:
    return seed * 1_000_003 + part


def _draw(module: Any, seed: int, part: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(seed, part))
        module.init_weights()


@torch.no_grad()
def copy_shards(full: Iterable[Tensor], parts: Iterable[nn.Parameter]) -> None:
    """Copy whole CPU tensors into parameters of which each rank holds a shard."""
    for whole, part in zip(full, parts, strict=True):
        assert whole.shape == part.shape
        if isinstance(part, DTensor):
            # src_data_rank=None: every rank has the same tensor already, nothing is sent.
            shard = distribute_tensor(
                whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None
            )
            part.to_local().copy_(shard.to_local())
        else:
            part.copy_(whole)
