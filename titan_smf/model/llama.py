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
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_smf.errors import ConfigError
from titan_smf.model.key_value_cache import KeyValueCache
from titan_smf.model.memory_layer import MemoryLayer
from titan_smf.model.names import is_adapter
from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.torchtitan_api import (
    Attention,
    FeedForward,
    Transformer,
    TransformerBlock,
    TransformerModelArgs,
)

Part = Literal["all", "to_memory", "from_memory"]


@dataclass
class MemoryArgs:
    """Shape of the memory layers and their tables; see `config.sections.Memory`."""

    layers: list[int] = field(default_factory=list)
    n_keys: int = 1024
    heads: int = 4
    k: int = 32
    k_dim: int = 512
    v_dim: int = 1024
    share_values: bool = True
    qk_norm: bool = False
    value_dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    @property
    def num_slots(self) -> int:
        """N, the number of slots of one table."""
        return self.n_keys**2

    @property
    def num_tables(self) -> int:
        """One table for all memory layers, or one each."""
        return min(len(self.layers), 1) if self.share_values else len(self.layers)


@dataclass
class MemoryLlamaArgs(TransformerModelArgs):
    """Sizes of the whole model; `update_from_config` puts the user's settings over a flavor's."""

    ffn_dim: int = 8192
    memory: MemoryArgs = field(default_factory=MemoryArgs)
    seed: int = 0

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Apply `[model]` and `[memory]` settings that are given, then check the result.

        Raises:
            ConfigError: a combination that this model cannot have.
        """
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "rope_theta"):
            if (value := getattr(job_config.model, name)) is not None:
                setattr(self, name, value)
        if job_config.model.attn_type is not None:
            self.attn_type = job_config.model.attn_type
        # Documents are kept apart where the attention can do it.
        self.attn_mask_type = "block_causal" if self.attn_type == "flex" else "causal"
        for setting in dataclasses.fields(MemoryArgs):
            if (value := getattr(job_config.memory, setting.name)) is not None:
                setattr(self.memory, setting.name, value)
        self.seed = job_config.debug.seed or 0
        super().update_from_config(job_config, **kwargs)
        others = (job_config.validation.seq_len, job_config.evaluation.seq_len or 0)
        self.max_seq_len = max(self.max_seq_len, *others)
        self._check()

    def _check(self) -> None:
        memory = self.memory
        if self.attn_type == "flex" and not torch.accelerator.is_available():
            allowed = "sdpa on a CPU, where flex attention has no backward pass"
            raise ConfigError("model.attn_type", "flex", allowed)
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            allowed = f"a divisor of model.dim {self.dim} that leaves an even head size"
            raise ConfigError("model.n_heads", self.n_heads, allowed)
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ConfigError(
                "model.n_kv_heads", self.n_kv_heads, f"a divisor of model.n_heads {self.n_heads}"
            )
        if any(not 0 <= layer < self.n_layers for layer in memory.layers):
            allowed = f"layer indices from 0 to {self.n_layers - 1}: the model has {self.n_layers}"
            raise ConfigError("memory.layers", memory.layers, allowed)
        if memory.k > memory.n_keys:
            raise ConfigError("memory.k", memory.k, f"at most memory.n_keys, {memory.n_keys}")
        slots = memory.num_tables * memory.num_slots
        if slots >= 2**31:
            allowed = "half-keys of which all tables' slots, its square each, are below 2**31"
            raise ConfigError("memory.n_keys", memory.n_keys, allowed)
        if memory.k_dim % 2:
            raise ConfigError("memory.k_dim", memory.k_dim, "an even number: a key has two halves")

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Total parameters, and FLOPs a token of a forward and backward pass (active ones only)."""
        sizes = parameter_counts(model)
        attention = 6 * self.n_layers * self.n_heads * 2 * (self.dim // self.n_heads) * seq_len
        return sizes.total, 6 * (sizes.active - sizes.embedding) + attention


FLAVORS: dict[str, MemoryLlamaArgs] = {
    # About a million parameters, for tests and first steps on a CPU.
    "debug": MemoryLlamaArgs(
        dim=64,
        n_layers=4,
        n_heads=4,
        ffn_dim=176,
        rope_theta=10000,
        memory=MemoryArgs([2], n_keys=96, heads=4, k=8, k_dim=32, v_dim=64, qk_norm=True),
    ),
    # Learns a small invented world in minutes on a CPU.
    "demo": MemoryLlamaArgs(
        dim=128,
        n_layers=4,
        n_heads=4,
        ffn_dim=384,
        rope_theta=10000,
        memory=MemoryArgs([2], n_keys=256, heads=4, k=8, k_dim=64, v_dim=128, qk_norm=True),
    ),
    # The paper's model: arXiv 2510.15103. It does not publish the number of attention heads.
    "1.3B": MemoryLlamaArgs(
        dim=2048,
        n_layers=22,
        n_heads=16,
        ffn_dim=8192,
        rope_theta=500000,
        memory=MemoryArgs([12], n_keys=1024, heads=4, k=32, k_dim=512, v_dim=1024),
    ),
}


@dataclass
class ParameterCounts:
    """Numbers of parameters: all, those a token uses, and those of the token embedding."""

    total: int
    active: int
    embedding: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count parameters; of a value table a token uses K rows in each memory layer."""
    assert isinstance(model, MemoryLlama)
    memory = model.model_args.memory
    total = sum(p.numel() for p in model.parameters())
    in_tables = sum(p.numel() for p in model.tables.parameters())
    read = len(memory.layers) * memory.heads * memory.k * memory.v_dim
    return ParameterCounts(total, total - in_tables + read, model.tok_embeddings.weight.numel())


def num_trainable(model: nn.Module) -> int:
    """Count parameters that get a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rotate(x_BSHE: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the precision of `x`, and at least in float32; shape and dtype stay.

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
        x: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_masks: Any = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D), causal; with flex attention within documents.

        With a cache attention is to what the cache holds, too, and all of that is one document.
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


class Addressed(NamedTuple):
    """Tokens at a memory layer that have their slots: from here on nothing depends on the query."""

    h: torch.Tensor
    """(B, S, D), after the block's attention."""
    slots: torch.Tensor
    """(T, K) int64."""
    weights: torch.Tensor
    """(T, K)."""


class MemoryBlock(TransformerBlock):
    """A pre-norm block whose feed-forward is a memory layer."""

    def __init__(self, layer_id: int, args: MemoryLlamaArgs) -> None:
        super().__init__(layer_id, args)
        memory = args.memory
        self.attention = LlamaAttention(layer_id, args)
        del self.feed_forward
        self.memory = MemoryLayer(
            args.dim,
            n_keys=memory.n_keys,
            heads=memory.heads,
            k=memory.k,
            k_dim=memory.k_dim,
            v_dim=memory.v_dim,
            qk_norm=memory.qk_norm,
        )

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor | Addressed,
        freqs_cis: torch.Tensor,
        attention_masks: Any,
        table: ValueTable,
        counted: torch.Tensor | None,
        selected: SelectedRows | None,
        only_count: bool,
        cache: KeyValueCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Addressed]:
        """(B, S, D) -> (B, S, D), the rows of this rank that were accessed, and where to go on.

        With `only_count` no value is read, and the first result means nothing.
        """
        if isinstance(x, Addressed):
            at = x
            normed = self.ffn_norm(at.h)
        else:
            h = x + self.attention(self.attention_norm(x), freqs_cis, attention_masks, cache)
            normed = self.ffn_norm(h)
            at = Addressed(h, *self.memory.address(normed))
        if only_count:
            return at.h, table.count(at.slots, None if counted is None else counted.flatten()), at
        out, accesses = self.memory(normed, table, counted, selected, (at.slots, at.weights))
        return at.h + out, accesses, at

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
        """The tables, one for all memory layers or one each in the layers' order."""
        for table in self.tables:
            assert isinstance(table, ValueTable)
            yield table

    def forward(
        self,
        tokens: torch.Tensor | Addressed,
        attention_masks: Any = None,
        counted: torch.Tensor | None = None,
        part: Part = "all",
        selected: Sequence[SelectedRows] | None = None,
        observe: Callable[[Addressed], None] | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[torch.Tensor | Addressed, list[torch.Tensor]]:
        """Logits of every position, and what the tables of this rank were asked for.

        Args:
            tokens: (B, S) token ids; for "from_memory" what "to_memory" returned.
            attention_masks: flex attention's block mask, or None for causal attention.
            counted: (B, S) bool, the tokens whose accesses are reported; None means all.
            part: "all"; "to_memory" ends with the addresses of the last memory layer and reads no
                value there; "from_memory" goes on from the lookup of the first memory layer.
            selected: for each table the rows that get a gradient; None for all.
            observe: called with this rank's tokens at each memory layer, in the layers' order.
            cache: what the sequences have read before; the tokens are added to it.

        Returns:
            logits (B, S, vocabulary), those (B, vocabulary) after each sequence's last token if
            there is a cache, or the tokens at the lookup of the first memory layer if
            `part` is "to_memory"; and for each memory layer in order the rows of this rank's
            part of its table that were accessed by counted tokens of all ranks of the shard group.
        """
        layers = self.model_args.memory.layers
        h = tokens if isinstance(tokens, Addressed) else self.tok_embeddings(tokens)
        S = (tokens.h if isinstance(tokens, Addressed) else tokens).shape[1]
        freqs_cis = self.freqs_cis[:S] if cache is None else self.freqs_cis[cache.read(S)]
        first: Addressed | None = None
        accesses: list[torch.Tensor] = []
        for name, block in self.layers.items():
            layer = int(name)
            if layer in layers:
                table = len(accesses) % len(self.tables)
                ends = part == "to_memory" and layer == max(layers)
                h, rows, at = block(
                    h,
                    freqs_cis,
                    attention_masks,
                    self.tables[table],
                    counted,
                    selected[table] if selected else None,
                    ends,
                    cache,
                )
                accesses.append(rows)
                if observe is not None:
                    observe(at)
                if ends:
                    return first or at, accesses
                if part == "to_memory":
                    first = first or at
            elif part != "from_memory" or accesses:
                # torchtitan's block hands its last argument, "positions", to the attention.
                h = block(h, freqs_cis, attention_masks, cache)
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
def copy_shards(full: Iterable[torch.Tensor], parts: Iterable[nn.Parameter]) -> None:
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
