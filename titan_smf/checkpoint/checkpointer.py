"""Checkpoints that are staged, hashed and committed, then loaded only if they are whole.

A checkpoint is a folder `step-N`:

    shard-*.safetensors   tensors, one file for each rank, with their place in the whole
    state.json            everything else: step, data position, random state, identity
    manifest.json         size and SHA-256 of every other file

Saving writes into `.staging-step-N`, adds the manifest last, and renames the folder: a folder named
`step-N` is complete. Older checkpoints are removed only after that. Tensors go through
torch.distributed.checkpoint in safetensors form, so any number of ranks can load them and nothing
in a checkpoint can run code.
"""

import base64
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from titan_smf.errors import CheckpointError
from titan_smf.model.names import is_adapter
from titan_smf.runtime import from_all_ranks, from_first_rank, is_first_rank, wait_for_ranks
from titan_smf.storage import write_json

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LAST = "last_checkpoint"
"""File beside the folder of checkpoints that names the one committed last."""

logger = logging.getLogger("titan_smf")


class RankFiles(Protocol):
    """A part of a run's state that each rank keeps in files of its own."""

    def save_files(self, folder: Path) -> None:
        """Write this rank's files; no other rank writes files of the same name."""

    def load_files(self, folder: Path) -> None:
        """Restore this rank's part from the files of all ranks, however many there were."""


@dataclass
class Checkpointer:
    """Saves and loads the full state of a run."""

    folder: Path
    """Where `step-N` folders are; shared by all ranks."""
    model: nn.Module
    """Its parameters and persistent buffers are saved as `model.*`."""
    optimizers: Stateful
    """Flat state (torchtitan's `OptimizersContainer`), saved as `optimizer.*`."""
    states: dict[str, Stateful]
    """Further parts whose state is small and JSON, by name."""
    identity: dict[str, Any]
    """What must be equal for a checkpoint to fit this run, as nested JSON values. `weights` is what
    must be equal to take the weights alone; `adapters` says what adapters there are."""
    keep: int
    """How many of the newest checkpoints stay; 0 keeps all."""
    rank_files: RankFiles | None = None
    """State that is neither a tensor by name nor small, if there is any."""

    def save(self, step: int) -> Path:
        """Write and commit `step-N`, then remove what `keep` no longer covers. Collective.

        What is not split over the ranks is rank 0's, the random state too. Needs as much memory
        again as this rank's weights and moments take.

        Raises:
            CheckpointError: it cannot be written; what was committed before is untouched.
        """
        try:
            return self._save(step)
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"{self.folder}: step {step} cannot be saved: {error}") from None

    def _save(self, step: int) -> Path:
        staging = self.folder / f".staging-step-{step}"
        if is_first_rank():
            for leftover in self.folder.glob(".staging-step-*"):
                shutil.rmtree(leftover)
            staging.mkdir(parents=True)
        wait_for_ranks()  # the folder must exist before any rank writes into it
        writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        dcp.save(_without_scalars(self._tensors()), storage_writer=writer)
        if is_first_rank():
            state = {
                "format": FORMAT,
                "step": step,
                "world_size": dist.get_world_size() if dist.is_initialized() else 1,
                "torch": str(torch.__version__),
                "identity": self.identity,
                "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
                "states": {name: part.state_dict() for name, part in self.states.items()},
            }
            write_json(staging / STATE, state)
        if self.rank_files is not None:
            self.rank_files.save_files(staging)
            wait_for_ranks()  # every file must be there before any is hashed
        final = self.folder / f"step-{step}"
        commit(staging, final)
        if is_first_rank():
            (self.folder.parent / LAST).write_text(f"{final.name}\n")
            if self.keep:
                for old in committed_steps(self.folder)[: -self.keep]:
                    shutil.rmtree(self.folder / f"step-{old}")
        wait_for_ranks()  # no rank goes on before the checkpoint counts
        return final

    def latest(self) -> int | None:
        """Return the newest committed step, the same on every rank."""
        return from_first_rank(lambda: max(committed_steps(self.folder), default=None))

    def load(self, step: int) -> None:
        """Restore the full state of `step-N`; rates and decay stay this run's. Collective.

        Raises:
            CheckpointError: it is missing, damaged, or of another model or tokenizer.
        """
        path = self.folder / f"step-{step}"
        state = open_checkpoint(path, self.identity)
        if lacking := sorted(self.states.keys() - state["states"].keys()):
            held = f"lacks the state of {lacking[0]}" if state["states"] else "holds weights alone"
            raise CheckpointError(
                f"{path}: {held}, no run can go on from there; start one from its weights by "
                "checkpoint.initial_load_path"
            )
        _read(path, self._tensors())
        if self.rank_files is not None:
            self.rank_files.load_files(path)
        random_state = bytearray(base64.b64decode(state["random"]))
        torch.set_rng_state(torch.frombuffer(random_state, dtype=torch.uint8))
        for name, part in self.states.items():
            part.load_state_dict(state["states"][name])

    def load_weights(self, path: Path) -> None:
        """Load only the model's weights from the checkpoint at `path`. Collective.

        Adapters that it does not have stay as they are.
        """
        state = open_checkpoint(path, {"weights": self.identity["weights"]})
        tensors = self._model_tensors()
        if state["identity"].get("adapters"):
            _check_identity(path, state, {"adapters": self.identity.get("adapters")})
        else:
            tensors = {name: t for name, t in tensors.items() if not is_adapter(name)}
        _read(path, tensors)

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        state: dict[str, Any] = get_model_state_dict(self.model)
        return {f"model.{name}": tensor for name, tensor in state.items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the run's own tensors by name: reading into them restores the run."""
        optimizer = {f"optimizer.{name}": v for name, v in self.optimizers.state_dict().items()}
        moments = {name: v for name, v in optimizer.items() if isinstance(v, torch.Tensor)}
        return self._model_tensors() | moments


def committed_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending; [] without a folder."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(
        int(name[1]) for name in names if name and (folder / name[0] / MANIFEST).is_file()
    )


def find_checkpoint(path: Path, setting: str = "checkpoint.initial_load_path") -> Path:
    """Return the checkpoint that `path` is, or the newest of a run's or a checkpoints folder.

    Args:
        path: as a user gave it.
        setting: in which; "" where it was an argument of a command.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    inside = sorted(path.iterdir()) if path.is_dir() else []
    for folder in (path, *inside):
        if steps := committed_steps(folder):
            return folder / f"step-{steps[-1]}"
    where = f"{setting}: {path}" if setting else path
    raise CheckpointError(
        f"{where}: no complete checkpoint there; "
        "give a run's folder, its checkpoints folder, or one step-N folder"
    )


def open_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what `state.json` says, of a checkpoint that is whole and fits `identity`. Collective.

    Raises:
        CheckpointError: it is missing, damaged, or differs from `identity`.
    """
    manifest = from_first_rank(lambda: _read_manifest(path))
    found = _hash_files([path / name for name in sorted(manifest)])
    damaged = sorted(name for name in manifest if found[name] != manifest[name])
    if damaged:
        raise CheckpointError(
            f"{path}: damaged, {', '.join(damaged)} is not as it was saved; restore the file, "
            "or remove the folder to go on from the step before"
        )
    state = json.loads((path / STATE).read_text())
    _check_identity(path, state, identity)
    return state


def _check_identity(path: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    for part, here in identity.items():
        saved = state["identity"].get(part)
        if part == "adapters" and saved and not here:
            raise CheckpointError(
                f'{path}: has adapters; set finetune.method = "lora", or merge them into their '
                "base by tools/merge_adapters.py"
            )
        if difference := describe_difference(saved, here, part if here is None else ""):
            raise CheckpointError(
                f"{path}: of another run: {difference}; start with the settings of that run, "
                "or give a new job.dump_folder"
            )


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of each file; CheckpointError if names alone tell that one is wrong."""
    if not (path / MANIFEST).is_file():
        steps = ", ".join(map(str, committed_steps(path.parent))) or "none"
        there = f"complete steps in {path.parent}: {steps}"
        raise CheckpointError(f"{path}: no complete checkpoint there; {there}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, written = manifest["files"], manifest["format"]
    except (ValueError, KeyError, TypeError):
        what = f"damaged, {MANIFEST} cannot be read; remove the folder to go on without"
        raise CheckpointError(f"{path}: {what}") from None
    if written != FORMAT:
        raise CheckpointError(f"{path}: its format is {written}, this version reads {FORMAT}")
    names = {file.name for file in path.iterdir()} - {MANIFEST}
    if extra := sorted(names - files.keys()):
        raise CheckpointError(f"{path}: {', '.join(extra)} does not belong there; move it away")
    return files


def _read(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` in place; names and shapes must be exactly the checkpoint's."""
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    prefixes = {name.split(".")[0] for name in tensors}
    names = {name for name in stored if name.split(".")[0] in prefixes}
    wanted = _without_scalars(tensors)
    for problem, keys in (("lacks", wanted.keys() - names), ("also has", names - wanted.keys())):
        if keys:
            raise CheckpointError(f"{path}: {problem} {len(keys)} tensors, as {sorted(keys)[0]}")
    for name, tensor in wanted.items():
        if stored[name].size != tensor.shape:  # type: ignore[union-attr]
            sizes = f"{tuple(stored[name].size)}, here {tuple(tensor.shape)}"  # type: ignore[union-attr]
            raise CheckpointError(f"{path}: {name} is {sizes}")
    dcp.load(wanted, storage_reader=reader)


def _without_scalars(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return views with at least one dimension: safetensors slices need one."""
    return {name: tensor if tensor.dim() else tensor.reshape(1) for name, tensor in tensors.items()}


def _hash_files(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Return sizes and hashes of the files by name. Collective: each rank hashes some of them."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine: dict[str, dict[str, Any]] = {}
    for path in paths[rank::ranks]:
        mine[path.name] = {"bytes": None, "sha256": None}
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            mine[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return dict(item for part in from_all_ranks(mine) for item in part.items())


def commit(staging: Path, final: Path) -> None:
    """Make the files in `staging` the checkpoint `final`: a manifest, then a rename. Collective."""
    # Rank 0's list: others may see a shared file system later.
    manifest = _hash_files(from_first_rank(lambda: sorted(staging.iterdir())))
    if not is_first_rank():
        return
    write_json(staging / MANIFEST, {"format": FORMAT, "files": manifest})
    if final.exists():
        # It has no manifest, or it would have been loaded: a run holds its folder alone.
        shutil.rmtree(final)
    staging.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def describe_difference(saved: Any, here: Any, key: str = "") -> str | None:
    """Return in words the first setting in which two nested JSON values differ; None if equal."""
    here = json.loads(json.dumps(here))
    if isinstance(saved, dict) and isinstance(here, dict):
        for name in sorted(saved.keys() | here.keys()):
            inner = f"{key}.{name}" if key else name
            if found := describe_difference(saved.get(name), here.get(name), inner):
                return found
        return None
    return None if saved == here else f"{key} was {saved!r} there and is {here!r} here"
