"""A checkpoint is whole or does not count, and only one that fits this run is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.launch import run_on_ranks
from tests.support.patch_runs import State
from tests.support.training_runs import SHORT, metrics, train
from titan_smf.checkpoint.checkpointer import (
    LAST,
    MANIFEST,
    Checkpointer,
    committed_steps,
    find_checkpoint,
)
from titan_smf.errors import CheckpointError

SAVED = SHORT | {"checkpoint.enable": "true", "checkpoint.interval": 2}


def checkpointer(folder: str, ranks: int, keep: int = 0) -> tuple[Checkpointer, nn.Module, Any]:
    """A sharded model of odd sizes with Adam state, drawn differently in every call."""
    from titan_smf.torchtitan_api import OptimizersContainer

    mesh = init_device_mesh("cpu", (ranks,))
    model = nn.Linear(5, 7)
    for name, parameter in list(model.named_parameters()):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(model, name, nn.Parameter(part))
    optimizers = OptimizersContainer([model], torch.optim.AdamW, {"lr": torch.rand(1).item()})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    states: dict[str, Any] = {"counter": State(position=0)}
    identity = {"weights": {"a": 1}, "training": {"dtype": "float32"}}
    path = Path(folder) / "checkpoints"
    return Checkpointer(path, model, optimizers, states, identity, keep), model, optimizers


def everything(model: nn.Module, optimizers: Any) -> list[torch.Tensor]:
    state: list[torch.Tensor] = []
    for parameter in model.parameters():
        kept = optimizers.optimizers[0].state[parameter]
        full = [parameter.data, kept["exp_avg"], kept["exp_avg_sq"]]
        state += [tensor.full_tensor() for tensor in full] + [kept["step"].clone()]
    return [*state, torch.rand(2)]


def save(rank: int, ranks: int, folder: str) -> list[Any]:
    saver, model, optimizers = checkpointer(folder, ranks, keep=2)
    for step in (5, 10, 15):
        saver.states["counter"].load_state_dict({"position": step})
        saver.save(step)
    return everything(model, optimizers)


def load(rank: int, ranks: int, folder: str) -> list[Any]:
    loader, model, optimizers = checkpointer(folder, ranks)
    rate = optimizers.optimizers[0].param_groups[0]["lr"]
    assert loader.latest() == 15
    loader.load(15)
    assert optimizers.optimizers[0].param_groups[0]["lr"] == rate, "rates are the configuration's"
    assert loader.states["counter"].state_dict() == {"position": 15}
    return everything(model, optimizers)


def test_every_number_of_ranks_loads_what_another_saved(tmp_path: Path) -> None:
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        (folder / "checkpoints/.staging-step-3").mkdir(parents=True)
        saved = run_on_ranks(save, ranks, str(folder))[0]
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == ["step-10", "step-15"]
        assert (folder / LAST).read_text() == "step-15\n"
        for readers in (1, 4):
            for loaded in run_on_ranks(load, readers, str(folder)):
                assert all(map(torch.equal, saved, loaded))


def refuse(rank: int, ranks: int, folder: str) -> dict[str, str]:
    """What loading says about each way in which a checkpoint can be wrong."""
    saver, _, _ = checkpointer(folder, ranks)
    good = saver.save(1)
    messages = {}

    def attempt(name: str, break_it: Any, loader: Checkpointer = saver) -> None:
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(good, saver.folder / "step-2")
            break_it(saver.folder / "step-2")
        torch.distributed.barrier()
        with pytest.raises(CheckpointError) as error:
            loader.load(2)
        messages[name] = str(error.value)
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(saver.folder / "step-2")

    def flip_a_bit(path: Path) -> None:
        file = next(path.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def no_change(path: Path) -> None: ...

    def like(model: nn.Module, **identity: Any) -> Checkpointer:
        return Checkpointer(saver.folder, model, saver.optimizers, {}, identity, 0)

    weights = saver.identity["weights"]
    attempt("flipped", flip_a_bit)
    attempt("lost", lambda path: next(path.glob("*.safetensors")).unlink())
    attempt("added", lambda path: (path / "shard-9.safetensors").write_bytes(b""))
    attempt("torn", lambda path: (path / MANIFEST).unlink())
    attempt("half", lambda path: (path / MANIFEST).write_text('{"files": {'))
    attempt("new", lambda path: (path / MANIFEST).write_text('{"files": {}, "format": 9}'))
    attempt("other", no_change, like(saver.model, weights={"a": 2}))
    attempt("type", no_change, like(saver.model, weights=weights, training={"dtype": "bfloat16"}))
    attempt("shape", no_change, like(nn.Linear(5, 8), **saver.identity))
    return messages


def test_what_is_not_whole_or_does_not_fit_is_refused_on_every_rank(tmp_path: Path) -> None:
    messages, others = run_on_ranks(refuse, 2, str(tmp_path))
    assert messages == others
    assert "step-2: damaged, shard-0000" in messages["flipped"]
    assert "step-2: damaged, shard-0000" in messages["lost"]
    assert "step-2: shard-9.safetensors does not belong there" in messages["added"]
    assert messages["torn"].endswith("checkpoints: 1")
    assert "step-2: damaged, manifest.json cannot be read" in messages["half"]
    assert "step-2: its format is 9, this version reads 1" in messages["new"]
    assert "step-2: of another run: a was 1 there and is 2 here" in messages["other"]
    assert "dtype was 'float32' there and is 'bfloat16' here" in messages["type"]
    assert (
        "is (7, 5), here (8, 5)" in messages["shape"] or "is (7,), here (8,)" in messages["shape"]
    )


def starts(rank: int, ranks: int, folder: str) -> dict[str, str]:
    """What a start says that cannot have the weights it was asked for."""
    base = Path(folder)
    train(rank, ranks, folder, {"base": SAVED})
    messages = {}

    def attempt(name: str, settings: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError) as error:
            train(rank, ranks, folder, {name: SAVED | settings})
        messages[name] = str(error.value)

    initial = {"checkpoint.initial_load_path": base / "base"}
    attempt(
        "tokenizer", initial | {"tokenizer.name": "", "tokenizer.path": base / "other.tiktoken"}
    )
    attempt("model", initial | {"memory.k": 4})
    attempt("step", {"checkpoint.load_step": 3})
    if rank == 0:
        shutil.copytree(base / "base", base / "gone")
        shutil.copytree(base / "base", base / "later")
        shutil.rmtree(base / "gone/checkpoints")
    torch.distributed.barrier()
    attempt("gone", {"training.steps": 6})
    attempt("later", {"checkpoint.load_step": 2})
    attempt("base", {"checkpoint.enable": "false"})
    train(rank, ranks, folder, {"new": SAVED | initial})
    return messages


def test_a_start_without_the_weights_it_was_asked_for_stops(tmp_path: Path) -> None:
    from titan_smf.data.tokenizer import train_rank_file

    train_rank_file(["some words of text"], 270, str(tmp_path / "other.tiktoken"))
    messages = run_on_ranks(starts, 2, str(tmp_path))[0]
    assert "tokenizer.fingerprint was" in messages["tokenizer"]
    assert "model.memory.k was 8 there and is 4 here" in messages["model"]
    assert "step-3: no complete checkpoint there; complete steps in" in messages["step"]
    assert "this run saved step-4, but" in messages["gone"]
    assert "holds a run with checkpoints up to step 4" in messages["base"]
    assert "holds the later step 4" in messages["later"]
    # A start from the given weights goes on from their loss, not from that of random weights.
    assert metrics(tmp_path / "new")[0] < metrics(tmp_path / "base")[0] - 0.1


def test_committed_steps_are_those_with_a_manifest(tmp_path: Path) -> None:
    for name in ("step-3", "step-20", ".staging-step-30", "step-x", "step-40"):
        (tmp_path / name).mkdir()
        if name != "step-40":
            (tmp_path / name / MANIFEST).write_text(json.dumps({"files": {}}))
    assert committed_steps(tmp_path) == [3, 20]
    assert find_checkpoint(tmp_path) == tmp_path / "step-20"
    assert committed_steps(tmp_path / "absent") == []
