"""The folder of a test's runs."""

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that `report` is given; it writes into `report` beside it."""
    return tmp_path / "root"
