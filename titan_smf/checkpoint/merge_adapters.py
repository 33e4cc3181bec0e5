"""Adapters folded into the weights that they were learned beside: a checkpoint without adapters."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from titan_smf.checkpoint.checkpointer import find_checkpoint
from titan_smf.checkpoint.fingerprint import RowBytes, rows_as_bytes
from titan_smf.checkpoint.peft_format import BASE_FILE, StoredAdapters, load_adapters
from titan_smf.checkpoint.stored_weights import WEIGHTS, Report, RowNumbers, StoredWeights
from titan_smf.errors import CheckpointError
from titan_smf.model.lora import merged_weight


def merge_adapters(base: Path, adapters: Path, output: Path, report: Report) -> None:
    """Write the checkpoint of `W + alpha / rank * B A` for each map with an adapter.

    Holds one of these weights at a time. What is written has the shards of the base: runs start
    from it by `checkpoint.initial_load_path` on any number of ranks, none goes on.

    Args:
        base: a `step-N` folder, or a run's for its newest checkpoint.
        adapters: a folder with the two files of PEFT, as a run with method "lora" leaves them. What
            such a run says of its base must be so.
        output: a new folder.

    Raises:
        CheckpointError: one is missing, damaged or does not fit the other; nothing is written.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists; give the name of a new folder")
    weights = StoredWeights(find_checkpoint(base))
    if weights.state["identity"].get("adapters"):
        raise CheckpointError(
            f"{weights.path}: has adapters itself; give the weights that the run started from"
        )
    model = weights.state["identity"]["weights"]["model"]
    found = load_adapters(adapters, model["n_heads"], model["n_kv_heads"])
    _check_fit(weights, found, adapters)
    _check_base(weights, found, adapters, report)
    weights.write(output, _Merged(weights, found), {"merged": str(adapters)}, report)
    report(f"{output}: weights of {weights.path} with {len(found.pairs)} adapters of {adapters}")


class _Merged(Mapping[str, tuple[RowNumbers, RowBytes]]):
    """All rows of the merged weights, made when they are asked for."""

    def __init__(self, weights: StoredWeights, adapters: StoredAdapters) -> None:
        self.weights = weights
        self.adapters = adapters

    def __getitem__(self, name: str) -> tuple[RowNumbers, RowBytes]:
        stored = self.weights.tensors[name]
        numbers = np.arange(stored.shape[0])
        rows = torch.from_numpy(stored.rows(numbers)).view(stored.dtype)
        A, B = self.adapters.pairs[name.removeprefix(WEIGHTS).removesuffix(".weight")]
        return numbers, rows_as_bytes(merged_weight(rows, A, B, self.adapters.scale))

    def __iter__(self) -> Iterator[str]:
        return (f"{WEIGHTS}{name}.weight" for name in self.adapters.pairs)

    def __len__(self) -> int:
        return len(self.adapters.pairs)


def _check_fit(weights: StoredWeights, adapters: StoredAdapters, folder: Path) -> None:
    for name, (A, B) in adapters.pairs.items():
        stored = weights.tensors.get(f"{WEIGHTS}{name}.weight")
        fits = A.shape[0] == B.shape[1]
        if stored is None or not fits or stored.shape != (B.shape[0], A.shape[1]):
            raise CheckpointError(
                f"{folder}: the adapter of {name} does not fit the weights in {weights.path}; give "
                "the base that it was learned beside"
            )


def _check_base(
    weights: StoredWeights, adapters: StoredAdapters, folder: Path, report: Report
) -> None:
    if adapters.base and (found := weights.fingerprint(report)) != adapters.base:
        raise CheckpointError(
            f"{folder}: the adapters were learned beside other weights: their fingerprint is "
            f"{adapters.base}, that of {weights.path} is {found}; give the base of that run, or "
            f"remove {folder / BASE_FILE} to merge them all the same"
        )
