"""Checkpoints that are staged, hashed and committed, then loaded only if they are whole.

A checkpoint is a folder `step-N`:

    shard-0000R-model-*.safetensors   tensors of rank R, with their place in the whole
    state.json                        everything else: step, schedule, data position, identity
    manifest.json                     size and SHA-256 of every other file

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from titan_smf.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

logger = logging.getLogger("titan_smf")


class Checkpointer:
    """Saves and loads the full state of a run.

    Args:
        folder: where `step-N` folders are; shared by all ranks.
        model: its parameters and persistent buffers are saved as `model.*`.
        optimizers: flat state (torchtitan's `OptimizersContainer`), saved as `optimizer.*`.
        states: further parts whose state is small and JSON, by name.
        identity: what must be equal for a checkpoint to fit this run, as nested JSON values.
        keep: how many of the newest checkpoints stay; 0 keeps all.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: Stateful,
        states: dict[str, Stateful],
        identity: dict[str, Any],
        keep: int,
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizers = optimizers
        self.states = states
        self.identity = identity
        self.keep = keep

    def save(self, step: int) -> Path:
        """Write and commit `step-N`, then remove what `keep` no longer covers. Collective.

        What is not split over the ranks is rank 0's, the random state too.
        """
        staging = self.folder / f".staging-step-{step}"
        if _is_first():
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        _wait()  # the folder must exist before any rank writes into it
        tensors, plain = self._optimizer_state()
        tensors |= _prefixed(self._model_state())
        writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
        dcp.save({name: _no_scalar(t) for name, t in tensors.items()}, storage_writer=writer)
        if _is_first():
            state = {
                "format": FORMAT,
                "step": step,
                "world_size": dist.get_world_size() if dist.is_initialized() else 1,
                "torch": str(torch.__version__),
                "identity": self.identity,
                "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
                "optimizer": plain,
                "states": {name: part.state_dict() for name, part in self.states.items()},
            }
            _write_json(staging / STATE, state)
        _wait()  # state.json is hashed too
        manifest = _on_all_ranks(_describe_files, sorted(staging.iterdir()))
        final = self.folder / f"step-{step}"
        if _is_first():
            _write_json(staging / MANIFEST, {"files": manifest})
            _commit(staging, final)
            self._prune()
        _wait()  # no rank goes on before the checkpoint counts
        return final

    def latest(self) -> int | None:
        """The newest committed step; the same answer on every rank."""
        return _from_first(lambda: max(committed_steps(self.folder), default=None))

    def load(self, step: int) -> None:
        """Restore the full state of `step-N`. Collective.

        Raises:
            CheckpointError: it is missing, damaged, or of another model or tokenizer.
        """
        path = self.folder / f"step-{step}"
        state = self._open(path)
        tensors, _ = self._optimizer_state()
        model = self._model_state()
        tensors |= _prefixed(model)
        _read(path, tensors)
        set_model_state_dict(self.model, model)
        random_state = bytearray(base64.b64decode(state["random"]))
        torch.set_rng_state(torch.frombuffer(random_state, dtype=torch.uint8))
        flat = {
            name.removeprefix("optimizer."): value
            for name, value in (tensors | state["optimizer"]).items()
            if name.startswith("optimizer.")
        }
        self.optimizers.load_state_dict(flat)
        for name, part in self.states.items():
            part.load_state_dict(state["states"][name])

    def load_weights(self, path: Path) -> None:
        """Take only the model's weights from the checkpoint at `path`. Collective."""
        self._open(path)
        model = self._model_state()
        _read(path, _prefixed(model))
        set_model_state_dict(self.model, model)

    def _open(self, path: Path) -> dict[str, Any]:
        problem = _from_first(lambda: _missing(path))
        if problem:
            raise CheckpointError(problem)
        manifest = json.loads((path / MANIFEST).read_text())["files"]
        found = _on_all_ranks(_describe_files, [path / name for name in sorted(manifest)])
        damaged = sorted(name for name in manifest if found[name] != manifest[name])
        if damaged:
            raise CheckpointError(
                f"{path}: damaged, {', '.join(damaged)} is not as it was saved; restore the file, "
                "or remove the folder to go on from the step before"
            )
        state = json.loads((path / STATE).read_text())
        difference = _first_difference(state["identity"], self.identity)
        if difference:
            raise CheckpointError(f"{path}: of another run: {difference}")
        return state

    def _model_state(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def _optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        flat = {f"optimizer.{name}": v for name, v in self.optimizers.state_dict().items()}
        tensors = {name: v for name, v in flat.items() if isinstance(v, torch.Tensor)}
        return tensors, {name: v for name, v in flat.items() if name not in tensors}

    def _prune(self) -> None:
        for leftover in self.folder.glob(".staging-step-*"):
            shutil.rmtree(leftover)
        if self.keep:
            for step in committed_steps(self.folder)[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{step}")


def committed_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; empty if there is no folder."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir())
    return sorted(
        int(name[1]) for name in names if name and (folder / name[0] / MANIFEST).is_file()
    )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run or checkpoint folder.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / MANIFEST).is_file():
            return folder
        if steps := committed_steps(folder):
            return folder / f"step-{steps[-1]}"
    raise CheckpointError(
        f"checkpoint.initial_load_path: {path}: no complete checkpoint there; "
        "give a run's folder, its checkpoints folder, or one step-N folder"
    )


def _missing(path: Path) -> str | None:
    if (path / MANIFEST).is_file():
        return None
    steps = ", ".join(map(str, committed_steps(path.parent))) or "none"
    return f"{path}: no complete checkpoint there; complete steps in {path.parent}: {steps}"


def _read(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` in place; names and shapes must be exactly the checkpoint's."""
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    prefixes = {name.split(".")[0] for name in tensors}
    names = {name for name in stored if name.split(".")[0] in prefixes}
    wanted = {name: _no_scalar(tensor) for name, tensor in tensors.items()}
    for problem, keys in (("lacks", wanted.keys() - names), ("also has", names - wanted.keys())):
        if keys:
            raise CheckpointError(f"{path}: {problem} {len(keys)} tensors, as {sorted(keys)[0]}")
    for name, tensor in wanted.items():
        if stored[name].size != tensor.shape:  # type: ignore[union-attr]
            sizes = f"{tuple(stored[name].size)}, here {tuple(tensor.shape)}"  # type: ignore[union-attr]
            raise CheckpointError(f"{path}: {name} is {sizes}")
    dcp.load(wanted, storage_reader=reader)


def _prefixed(model_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in model_state.items()}


def _no_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """A view with at least one dimension: safetensors slices need one."""
    return tensor if tensor.dim() else tensor.reshape(1)


def _describe_files(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return path.name, {"bytes": None, "sha256": None}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.name, {"bytes": path.stat().st_size, "sha256": digest}


def _on_all_ranks(
    describe: Callable[[Path], tuple[str, dict[str, Any]]], paths: list[Path]
) -> dict[str, dict[str, Any]]:
    """Spread `describe` over the ranks; every rank gets all answers."""
    if not dist.is_initialized():
        return dict(map(describe, paths))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, [describe(path) for path in paths[rank::ranks]])
    return dict(item for part in parts for item in part)


def _commit(staging: Path, final: Path) -> None:
    if final.exists():
        # An incomplete folder of that name: a committed step is never saved twice.
        shutil.rmtree(final)
    staging.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _first_difference(saved: Any, here: Any, key: str = "") -> str | None:
    """The first setting in which two nested JSON values differ, in words."""
    here = json.loads(json.dumps(here))
    if isinstance(saved, dict) and isinstance(here, dict):
        for name in sorted(saved.keys() | here.keys()):
            inner = f"{key}.{name}" if key else name
            if found := _first_difference(saved.get(name), here.get(name), inner):
                return found
        return None
    return None if saved == here else f"{key} was {saved!r} there and is {here!r} here"


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _from_first(ask: Callable[[], Any]) -> Any:
    """Rank 0's answer on every rank: they may see a shared file system at different moments."""
    answer = [ask() if _is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    return answer[0]
