"""LoRA: low-rank adapters that learn beside frozen linear maps (arXiv 2106.09685).

    y = x W^T + (alpha / rank) (x A^T) B^T          W (out, in), A (rank, in), B (out, rank)

B starts at zero, so a fresh model is the base model bit for bit. Adapters are parameters of the
module that stands in the place of the linear map: FSDP shards them with their block, and the names
of the base's weights stay. Attention and feed-forward maps can have adapters; norms, embeddings,
the output head (as in PEFT's "all-linear") and all of the memory layers stay as they are.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_smf.config.sections import Lora
from titan_smf.errors import ConfigError
from titan_smf.model.args import MemoryLlamaArgs
from titan_smf.model.llama import MemoryLlama, copy_shards
from titan_smf.storage import sha256_hex

ATTENTION = ("wq", "wk", "wv", "wo")
FEED_FORWARD = ("w1", "w2", "w3")


class LoraLinear(nn.Module):
    """A linear map without bias, frozen, and the adapter that learns beside it.

    Args:
        name: the map's full name in the model, which the adapter's initial values depend on.
        base: the map; its weight becomes this module's.
    """

    name: str
    scale: float
    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, name: str, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        assert base.bias is None, "the maps of a Llama have no bias"
        self.name = name
        self.scale = alpha / rank
        self.weight = base.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        added = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + self.scale * added

    @torch.no_grad()
    def init_adapter(self, seed: int) -> None:
        """Draw A as PEFT does, U(-in**-0.5, +in**-0.5), the same for any number of ranks; B = 0."""
        key = sha256_hex(f"{seed}/{self.name}".encode(), digits=15)
        generator = torch.Generator().manual_seed(int(key, 16))
        bound = self.lora_A.shape[1] ** -0.5
        A = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        copy_shards([A, torch.zeros(self.lora_B.shape)], [self.lora_A, self.lora_B])


class LoraLlama(MemoryLlama):
    """A Llama in which adapters, and nothing else, can learn."""

    def __init__(self, args: MemoryLlamaArgs, lora: Lora) -> None:
        super().__init__(args)
        self.requires_grad_(False)
        names = target_names(args, lora)
        for name, module in list(self.layers.named_modules(prefix="layers")):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names:
                self.set_submodule(name, LoraLinear(name, module, lora.rank, lora.alpha))

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the base's initial weights as the base does, and the adapters'."""
        super().init_weights(buffer_device)
        for adapter in adapters(self):
            adapter.init_adapter(self.model_args.seed)


def adapters(model: nn.Module) -> Iterator[LoraLinear]:
    """Iterate over the linear maps with adapters, in the order of the layers."""
    return (module for module in model.modules() if isinstance(module, LoraLinear))


def target_names(args: MemoryLlamaArgs, lora: Lora) -> tuple[str, ...]:
    """Return the names of the linear maps that `lora.targets` stands for.

    Raises:
        ConfigError: the model has none of them.
    """
    targets = lora.targets
    if targets == "all":
        return ATTENTION + FEED_FORWARD
    names = ATTENTION if targets == "attention" else tuple(targets)
    has_feed_forward = len(set(args.memory.layers)) < args.n_layers
    if not any(name in ATTENTION or has_feed_forward for name in names):
        found = "all its feed-forwards are memory layers" if names else "the list is empty"
        raise ConfigError("lora.targets", targets, f"linear maps that the model has; {found}")
    return names


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `W + scale B A`, (out, in), computed in float64, rounded once to `weight`'s dtype."""
    return (weight.double() + scale * (B.double() @ A.double())).to(weight.dtype)
