"""Merge LoRA adapters into the weights that they were trained on: a checkpoint without adapters."""

from pathlib import Path

import numpy as np
import torch

from titan_smf.checkpoint.fingerprint import rows_as_bytes
from titan_smf.checkpoint.peft_format import BASE_FILE, load_adapters
from titan_smf.checkpoint.stored_weights import Report, Rows, StoredWeights
from titan_smf.errors import CheckpointError
from titan_smf.model.lora import merged_weight


def merge_adapters(base: Path, adapters: Path, output: Path, report: Report) -> None:
    """Write the checkpoint of `W + alpha / rank * B A` for each map with an adapter.

    Holds one of these weights at a time. What is written has the shards of the base: runs start
    from it by `checkpoint.initial_load_path` on any number of ranks, none goes on.

    Args:
        base: a `step-N` folder, or a run's for its newest checkpoint.
        adapters: a folder with the two files of PEFT, as a run with method "lora" leaves them. If
            it names its base by a fingerprint, `base` must have that one.
        output: a new folder.

    Raises:
        CheckpointError: one is missing, damaged or does not fit the other; nothing is written.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists; give the name of a new folder")
    weights = StoredWeights(base, report)
    if weights.state["identity"].get("adapters"):
        raise CheckpointError(
            f"{weights.path}: has adapters itself; give the weights that the run started from"
        )
    model = weights.state["identity"]["weights"]["model"]
    found = load_adapters(adapters, model["n_heads"], model["n_kv_heads"])
    pairs = {f"model.{name}.weight": pair for name, pair in found.pairs.items()}
    for name, (A, B) in pairs.items():
        stored = weights.tensors.get(name)
        fits = A.shape[0] == B.shape[1]
        if stored is None or not fits or stored.shape != (B.shape[0], A.shape[1]):
            raise CheckpointError(
                f"{adapters}: the adapter of {name} does not fit the weights in {weights.path}; "
                "give the base that it was trained on"
            )
    if found.base and (fingerprint := weights.fingerprint()) != found.base:
        raise CheckpointError(
            f"{adapters}: the adapters were trained on other weights: their fingerprint is "
            f"{found.base}, that of {weights.path} is {fingerprint}; give the base of that run, or "
            f"remove {adapters / BASE_FILE} to merge them all the same"
        )

    def merged_rows(name: str) -> Rows | None:
        if name not in pairs:
            return None
        stored = weights.tensors[name]
        numbers = np.arange(stored.shape[0])
        rows = torch.from_numpy(stored.rows(numbers)).view(stored.dtype)
        return numbers, rows_as_bytes(merged_weight(rows, *pairs[name], found.scale))

    weights.write(output, merged_rows, {"merged": str(adapters)})
    report(f"{output}: weights of {weights.path} with {len(pairs)} adapters of {adapters}")
