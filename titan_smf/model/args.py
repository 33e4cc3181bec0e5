"""Sizes of the model: what settings may say, the named flavors, and the parameters they make."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from titan_smf.errors import ConfigError
from titan_smf.torchtitan_api import TransformerModelArgs

SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "rope_theta")
"""Settings of `[model]` that shape the weights or what they compute."""


class ParameterCounts(NamedTuple):
    """Numbers of parameters: all, those a token uses, and those of the token embedding."""

    total: int
    active: int
    embedding: int


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
        shape = [setting.name for setting in dataclasses.fields(MemoryArgs)]
        for target, section, names in (
            (self, job_config.model, (*SIZES, "attn_type")),
            (self.memory, job_config.memory, shape),
        ):
            for name in names:
                if (value := getattr(section, name)) is not None:
                    setattr(target, name, value)
        # Documents are kept apart where the attention can do it.
        self.attn_mask_type = "block_causal" if self.attn_type == "flex" else "causal"
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

    def parameter_counts(self, model: nn.Module) -> ParameterCounts:
        """Count a model's parameters; of a value table a token uses K rows in each memory layer."""
        memory, embedding = self.memory, model.get_parameter("tok_embeddings.weight").numel()
        total = sum(p.numel() for p in model.parameters())
        in_tables = sum(p.numel() for p in model.get_submodule("tables").parameters())
        read = len(memory.layers) * memory.heads * memory.k * memory.v_dim
        return ParameterCounts(total, total - in_tables + read, embedding)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return all parameters, and FLOPs per token of forward and backward (active ones)."""
        sizes = self.parameter_counts(model)
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


def num_trainable(model: nn.Module) -> int:
    """Count the parameters that get a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
