"""A sparse run that was stopped or killed goes on as if it never was, and so do runs on patches."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.launch import run_on_ranks
from tests.support.patch_runs import bits_of
from tests.support.sparse_runs import RUNS, base_of, check_own_patch, check_resumed, exact
from tests.support.training_runs import (
    HSDP,
    TABLE_EACH,
    Settings,
    arguments,
    build,
    kill,
    start_ranks,
    train,
    wait_for_step,
)
from titan_smf.checkpoint.patch import chain
from titan_smf.checkpoint.patch_checkpoints import export_patch
from titan_smf.checkpoint.patch_file import load_patch
from titan_smf.errors import ConfigError, PatchError


def learn_until(rank: int, ranks: int, folder: str, settings: Settings, step: int) -> None:
    """A sparse run of which one rank is asked to stop during a step."""
    trainer = build(Path(folder), settings)
    train_step = trainer.train_step

    def asked_to_stop(batches: Iterator[Any]) -> tuple[dict[str, float], bool]:
        if trainer.step == step and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batches)

    trainer.train_step = asked_to_stop
    assert not trainer.train(), "it says that it was stopped"
    trainer.close()


def test_stopped_and_resumed_on_other_ranks_it_ends_as_if_never_stopped(
    sparse_runs: Path, bases: Path, tmp_path: Path
) -> None:
    settings, run = exact(bases, "decay", RUNS["decay"]), tmp_path / "run"
    base = base_of(bases, "decay")
    run_on_ranks(learn_until, 4, str(run), settings | HSDP | {"checkpoint.interval": 100}, 4)
    assert check_own_patch(run, base).metadata.lineage[0].steps == 4
    run_on_ranks(train, 2, str(tmp_path), {"run": settings})
    check_resumed(run, sparse_runs / "1/decay", base)


def test_killed_at_any_moment_and_resumed_it_ends_as_if_never_killed(
    sparse_runs: Path, bases: Path, tmp_path: Path
) -> None:
    settings = exact(bases, "tfidf", RUNS["tfidf"])
    killed = tmp_path / "killed"
    words = arguments(killed, settings | {"checkpoint.interval": 1})
    processes = start_ranks(2, "-m", "titan_smf.train", *words)
    wait_for_step(killed, random.randint(1, 3), processes)
    time.sleep(random.uniform(0, 0.1))
    kill(processes)
    assert not (killed / "patch.safetensors").exists(), "it was killed before its end"
    straight, base = sparse_runs / "2/tfidf", base_of(bases, "tfidf")
    for ranks in (1, 2):
        run = tmp_path / f"{ranks}"
        shutil.copytree(killed, run)
        run_on_ranks(train, ranks, str(tmp_path), {run.name: settings})
        patch = check_resumed(run, straight, base)
    whole = load_patch(str(straight / "patch.safetensors"))
    assert patch.metadata.result == whole.metadata.result, "on as many ranks, bit for bit"


def learn_from_patches(rank: int, ranks: int, folder: str, bases: str, first: str) -> None:
    """Runs from a base and patches, one from the checkpoint that they lead to, and refused ones."""
    from titan_smf.training.run_patch import apply_patches

    settings = exact(Path(bases), "tfidf", RUNS["tfidf"])
    settings |= {"stream.path": "synthetic:world?facts=300&new_facts=4&seed=1"}
    p1, p2 = f"{first}/patch.safetensors", f"{folder}/second/patch.safetensors"
    start, patches = "checkpoint.initial_load_path", "checkpoint.initial_patches"
    both = settings | {patches: json.dumps([p1, p2]), "training.steps": 1}
    adapters = {"finetune.method": "lora", "selection.ranking": "tf"}
    accepted = {
        "second": settings | {patches: json.dumps([p1])},
        "same": settings | {start: first},
        "third": both,
        "beside the patch": both | adapters,
    }
    train(rank, ranks, folder, accepted)
    refused = {
        "is of other weights": settings | {patches: json.dumps([p2])},
        "patch 2 changes weights with": settings | {patches: json.dumps([p2, p1])},
        "patch is of another model: ": settings
        | {patches: json.dumps([p1]), start: f"{bases}/table each"}
        | TABLE_EACH,
    }
    for number, (message, wrong) in enumerate(refused.items()):
        with pytest.raises(PatchError, match=f"^checkpoint.initial_patches, .*: .*{message}"):
            train(rank, ranks, folder, {f"refused {number}": wrong | {"selection.ranking": "tf"}})
    with pytest.raises(ConfigError, match=r"initial_patches: got .*without memory"):
        apply_patches(SimpleNamespace(value_tables=lambda: iter(())), [p1])  # type: ignore[arg-type]


def test_a_run_starts_from_a_base_and_patches(
    sparse_runs: Path, bases: Path, tmp_path: Path
) -> None:
    first = sparse_runs / "4/tfidf"
    run_on_ranks(learn_from_patches, 2, str(tmp_path), str(bases), str(first))
    base, second = base_of(bases, "tfidf"), tmp_path / "second"
    p1, p2 = (load_patch(str(run / "patch.safetensors")) for run in (first, second))
    p3 = load_patch(str(tmp_path / "third/patch.safetensors"))
    assert p2.metadata.base == p1.metadata.result
    assert [step.parent for step in p2.metadata.lineage] == [p1.metadata.result]
    assert bits_of(check_own_patch(tmp_path / "same", first)) == bits_of(p2)
    chained = chain([p1, p2])
    exported = export_patch(base, second, "", print)
    assert bits_of(chained) == bits_of(exported)
    assert chained.metadata.result == exported.metadata.result == p3.metadata.base
    assert [step.parent for step in chain([p1, p2, p3]).metadata.lineage] == [
        p1.metadata.base,
        p1.metadata.result,
        p2.metadata.result,
    ]
