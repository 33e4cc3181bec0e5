"""Adapters as PEFT reads them: `adapter_model.safetensors` and `adapter_config.json` in a folder.

Names are those of Hugging Face's Llama, base_model.model.model. + :

    layers.3.attention.wq      layers.3.self_attn.q_proj.lora_A.weight   (rank, in)
                               layers.3.self_attn.q_proj.lora_B.weight   (out, rank)
    layers.3.feed_forward.w1   layers.3.mlp.gate_proj. ...

Hugging Face's rotary embedding pairs the rows i and i + E/2 of a head of size E, torchtitan's the
rows 2i and 2i + 1. So the rows of B of query and key maps are permuted here, as the rows of these
weights are when a Llama is converted. A dense model with its adapters and a converted base with the
file give the same logits; for a memory model PEFT has no base.

`adapter_base.json`, which PEFT does not read, has the fingerprint of the weights of their base.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_smf import storage
from titan_smf.checkpoint.fingerprint import model_fingerprint
from titan_smf.config.sections import Lora
from titan_smf.errors import CheckpointError
from titan_smf.model.lora import LoraLlama, adapters
from titan_smf.runtime import is_first_rank

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
BASE_FILE = "adapter_base.json"

_PREFIX = "base_model.model.model."
_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_CHANGES_RESULT = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
"""Settings of PEFT that change what an adapter does, where they are not false or empty."""


@dataclass(frozen=True)
class StoredAdapters:
    """The adapters of a file, under the names and in the row order of this project."""

    scale: float
    """alpha / rank."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    """By the map's name, as `layers.3.attention.wq`: A (rank, in) and B (out, rank)."""

    base: str
    """Fingerprint of the weights that they were trained on; empty if that is not known."""


def save_adapters(model: LoraLlama, lora: Lora, base: str | None, folder: Path) -> None:
    """Write the files into `folder`. Collective; rank 0 writes, and holds all adapters on its CPU.

    Args:
        base: where the base's weights came from, for the reader's information.
    """
    tensors: dict[str, Tensor] = {}
    names = set()
    heads = _rotary_heads(model.model_args.n_heads, model.model_args.n_kv_heads)
    for adapter in adapters(model):
        A, B = _whole(adapter.lora_A), _whole(adapter.lora_B)
        if is_first_rank():
            block, name = _split_name(adapter.name)
            key = f"{_PREFIX}{block}.{_NAMES[name]}"
            tensors[f"{key}.lora_A.weight"] = A.cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = _to_halves(B.cpu(), heads.get(name, 0)).contiguous()
            names.add(_NAMES[name].partition(".")[2])
    fingerprint = model_fingerprint(model)
    if not is_first_rank():
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(names),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    content = safetensors.torch.save(tensors, {"format": "pt"})
    storage.write_bytes(str(folder / ADAPTER_FILE), content)
    for file, values in ((CONFIG_FILE, config), (BASE_FILE, {"fingerprint": fingerprint})):
        storage.write_bytes(str(folder / file), json.dumps(values, indent=2).encode())


def load_adapters(folder: Path, n_heads: int, n_kv_heads: int | None) -> StoredAdapters:
    """Read the adapters in `folder`, for a Llama with these numbers of heads.

    Raises:
        CheckpointError: there are none, or they are of another kind than those saved here.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = safetensors.torch.load_file(folder / ADAPTER_FILE)
        rank, alpha = config["r"], config["lora_alpha"]
        known = folder / BASE_FILE
        base = json.loads(known.read_text())["fingerprint"] if known.is_file() else ""
    except FileNotFoundError as error:
        allowed = "give the folder of a run with finetune.method lora"
        raise CheckpointError(f"{error.filename or folder}: no adapters there; {allowed}") from None
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: the adapters cannot be read: {error!r}") from None
    other = [name for name in _CHANGES_RESULT if config.get(name)]
    if config.get("peft_type") != "LORA" or other:
        kind = ", ".join(other) or config.get("peft_type")
        raise CheckpointError(f"{folder}: adapters with {kind} are not supported, plain LoRA is")
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{folder}: adapters of rank {rank!r}, which is impossible")
    ours = {theirs: name for name, theirs in _NAMES.items()}
    pairs = {}
    for key in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
        block, theirs = _split_name(name.removeprefix(_PREFIX))
        B = tensors.pop(f"{name}.lora_B.weight", None)
        heads = _rotary_heads(n_heads, n_kv_heads).get(ours.get(theirs, ""), 0)
        if theirs not in ours or B is None or (heads and B.shape[0] % (2 * heads)):
            raise CheckpointError(f"{folder}: {name} is no adapter of a map of this Llama")
        pairs[f"{block}.{ours[theirs]}"] = tensors.pop(key), _to_pairs(B, heads)
    if tensors:
        raise CheckpointError(f"{folder}: {sorted(tensors)[0]} is no part of an adapter")
    return StoredAdapters(alpha / rank, pairs, base)


def _split_name(name: str) -> tuple[str, str]:
    """Split `layers.3.attention.wq` into `layers.3` and `attention.wq`."""
    *block, rest = name.split(".", 2)
    return ".".join(block), rest


def _rotary_heads(n_heads: int, n_kv_heads: int | None) -> dict[str, int]:
    """Return the number of heads of each map whose output a rotary embedding turns."""
    return {"attention.wq": n_heads, "attention.wk": n_kv_heads or n_heads}


def _to_halves(B: Tensor, heads: int) -> Tensor:
    """Put the even rows of each head first, then the odd ones: 0, 1, 2, 3 become 0, 2, 1, 3."""
    return B.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else B


def _to_pairs(B: Tensor, heads: int) -> Tensor:
    """Undo `_to_halves`."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else B


def _whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
