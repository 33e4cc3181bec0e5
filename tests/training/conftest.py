"""Sparse runs that several files look at."""

from pathlib import Path

import pytest

from tests.support.launch import run_on_ranks
from tests.support.sparse_runs import BASES, DOCUMENTS, RUNS, exact
from tests.support.training_runs import EXACT, HSDP, Settings, count, train

BASE: Settings = EXACT | {
    "training.steps": 1,
    "lr_scheduler.warmup_steps": 0,
    "validation.enable": "false",
    "metrics.enable_tensorboard": "false",
}
ON_ONE_RANK: dict[str, Settings] = {  # where the others accumulate four micro-batches
    "one micro-batch": {"training.global_batch_size": 8, "training.local_batch_size": 8},
    "padded": {"training.seq_len": 192},
    "padded more": {"training.seq_len": 256},
}


def make_bases(rank: int, ranks: int, folder: str) -> None:
    train(rank, ranks, folder, {name: BASE | settings for name, settings in BASES.items()})
    base = {"checkpoint.initial_load_path": Path(folder) / "one layer"}
    count(rank, ranks, f"{folder}/idf", DOCUMENTS | base)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sparse runs start from: models of each kind, and counts of the one layer's."""
    folder = tmp_path_factory.mktemp("bases")
    run_on_ranks(make_bases, 2, str(folder))
    return folder


@pytest.fixture(scope="session")
def sparse_runs(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run on 1, 2 and 4 ranks and on HSDP 2x2, in float64."""
    folder = tmp_path_factory.mktemp("runs")
    all_runs = {name: exact(bases, name, settings) for name, settings in RUNS.items()}
    alone = {name: exact(bases, name, settings) for name, settings in ON_ONE_RANK.items()}
    run_on_ranks(train, 1, str(folder / "1"), all_runs | alone, timeout=300)
    run_on_ranks(train, 2, str(folder / "2"), all_runs, timeout=300)
    on_four = {f"4/{name}": settings for name, settings in all_runs.items()}
    on_four |= {f"2x2/{name}": settings | HSDP for name, settings in all_runs.items()}
    run_on_ranks(train, 4, str(folder), on_four, timeout=600)
    return folder
