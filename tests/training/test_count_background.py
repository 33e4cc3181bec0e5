"""The counts of background data do not depend on the ranks, nor on interruptions."""

import random
import time
from pathlib import Path

import pytest
import torch

from tests.support.launch import run_on_ranks
from tests.support.sparse_runs import DOCUMENTS, base_of, idf_of
from tests.support.training_runs import COUNTING, ROOT, arguments, count, kill, start_ranks
from titan_smf.errors import ConfigError


def count_in_two_goes(rank: int, ranks: int, folder: str, base: str) -> None:
    settings = DOCUMENTS | {"checkpoint.initial_load_path": base}
    count(rank, ranks, folder, settings | {"idf.num_batches": 3})
    if rank == 0:
        path = Path(folder) / "idf.safetensors"
        path.rename(path.with_name(path.name + ".partial"))
    torch.distributed.barrier()
    few = {"idf.num_batches": 2, "idf.path": f"{folder}/idf.safetensors"}
    with pytest.raises(ConfigError, match=r"idf.num_batches: got 2; allowed: 3 or more"):
        count(rank, ranks, f"{folder}/few", settings | few)
    count(rank, ranks, folder, settings | {"replay.share": 0.5, "optimizer.name": "SGD"})


def test_counts_do_not_depend_on_ranks_or_interruptions(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "tfidf")
    run_on_ranks(count_in_two_goes, 4, str(tmp_path), str(base))
    assert (tmp_path / "idf.safetensors").read_bytes() == idf_of(bases).read_bytes()
    assert (tmp_path / "document_frequency.png").stat().st_size > 10_000


def test_a_count_that_is_killed_ends_with_the_same_file(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "tfidf")
    settings = DOCUMENTS | {"checkpoint.initial_load_path": base}
    path = tmp_path / "idf.safetensors"
    partial = path.with_name(path.name + ".partial")
    words = arguments(path.parent, COUNTING | settings)
    processes = start_ranks(2, str(ROOT / "tools/compute_idf.py"), *words)
    while not partial.exists():
        assert all(process.poll() is None for process in processes), "a rank ended early"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    kill(processes)
    assert not path.exists(), "it was killed before its end"
    run_on_ranks(count, 1, str(path.parent), settings)
    assert path.read_bytes() == idf_of(bases).read_bytes()
    assert not partial.exists(), "the complete file replaces it"
