"""Sparse finetuning runs for tests: their bases and settings, and what holds of what they wrote."""

from pathlib import Path

import pytest
import torch

from tests.support.patch_runs import bits_of
from tests.support.training_runs import (
    EXACT,
    SHARED_TABLE,
    SPARSE_FT,
    TABLE_EACH,
    Settings,
    metrics,
    selections,
    weights,
)
from titan_smf.checkpoint.patch import Patch
from titan_smf.checkpoint.patch_checkpoints import export_patch
from titan_smf.checkpoint.patch_file import load_patch

SHORT: Settings = SPARSE_FT | {
    "training.steps": 6,
    "checkpoint.interval": 3,
    "stream.path": "synthetic:world?facts=300&new_facts=4",
    "stream.epochs": 2,
    "metrics.enable_tensorboard": "false",
    "selection.verify": "true",
    "selection.top_t": 40,
}
BASES: dict[str, Settings] = {
    "one layer": {},
    "shared table": SHARED_TABLE,
    "table each": TABLE_EACH,
}
DOCUMENTS: Settings = EXACT | {"idf.num_batches": 12, "idf.checkpoint_interval": 1}
RUNS: dict[str, Settings] = {
    "tf": {},
    "tfidf": {"selection.ranking": "tfidf"},
    "kl": {"selection.ranking": "kl"},
    "random": {"selection.ranking": "random"},
    "all": {"selection.ranking": "all"},
    "more than there are": {"selection.top_t": 100_000},
    "sgd": {"optimizer.name": "SGD", "memory.value_lr": 20.0, "selection.ranking": "tfidf"},
    "decay": {"memory.value_weight_decay": 0.5},
    "shared table": SHARED_TABLE,
    "table each": TABLE_EACH,
    "checkpointed": {"activation_checkpoint.mode": "full"},
}
CHANGED = ("tfidf", "sgd", "decay", "shared table", "table each", "all")
"""Runs whose changed rows are looked at."""
PLACEMENTS = ("1", "2", "4", "2x2")


def base_of(bases: Path, name: str) -> Path:
    """The run that the run of this name starts from."""
    return bases / (name if name in BASES else "one layer")


def idf_of(bases: Path) -> Path:
    return bases / "idf/idf.safetensors"


def exact(bases: Path, name: str, settings: Settings) -> Settings:
    """All settings of a run in float64."""
    given = {
        "selection.idf_path": idf_of(bases),
        "checkpoint.initial_load_path": base_of(bases, name),
    }
    return SHORT | EXACT | given | settings


def distinct_rows(folder: Path) -> list[int]:
    """After each step, by the log of selections."""
    seen: set[int] = set()
    return [len(seen := seen | set(line["slots"])) for line in selections(folder)]


def only_selected_rows_changed(folder: Path) -> None:
    """From the third step to the sixth and last."""
    early, late = weights(folder, 3), weights(folder, 6)
    slots = {slot for line in selections(folder)[3:] for slot in line["slots"]}
    for key, tensor in late.items():
        if not key.startswith("model.tables."):
            assert torch.equal(tensor, early[key]), key
            continue
        table = int(key.split(".")[2])
        selected = [slot - table * 9216 for slot in slots if slot // 9216 == table]
        changed = (tensor != early[key]).any(1)
        assert changed[selected].all(), "every selected row has learned"
        changed[selected] = False
        assert not changed.any(), "no other row has changed"


def check_own_patch(run: Path, base: Path) -> Patch:
    """The patch that a run wrote is the one that its checkpoint and the base's differ by."""
    own = load_patch(str(run / "patch.safetensors"))
    exported = export_patch(base, run, "", print)
    assert own.metadata == exported.metadata
    assert bits_of(own) == bits_of(exported)
    return own


def check_resumed(run: Path, straight: Path, base: Path) -> Patch:
    """A run that was interrupted has ended as one that was not, on any number of ranks."""
    assert selections(run) == selections(straight)
    assert metrics(run) == pytest.approx(metrics(straight), rel=0, abs=1e-10)
    assert metrics(run, "sparse/distinct_rows") == distinct_rows(straight)
    assert metrics(run, "sparse/overlap") == metrics(straight, "sparse/overlap")
    patch, whole = check_own_patch(run, base), load_patch(str(straight / "patch.safetensors"))
    assert patch.metadata.base == whole.metadata.base
    assert torch.equal(patch.ids, whole.ids)
    torch.testing.assert_close(patch.new, whole.new, rtol=0, atol=1e-9)
    return patch
