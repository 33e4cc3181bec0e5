"""Checkpoints of small runs, which the tests of patches share."""

from pathlib import Path

import pytest

from tests.support.launch import run_on_ranks
from tests.support.patch_runs import RANKS, Made, make_runs


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """The folder RANKS/DTYPE/RUN of checkpoints, and what running models were."""
    folder = tmp_path_factory.mktemp("saved")
    made = {}
    for ranks in RANKS:
        results = run_on_ranks(make_runs, ranks, str(folder))
        assert all(result == results[0] for result in results), "every rank says the same"
        made[ranks] = results[0]
    return folder, made
