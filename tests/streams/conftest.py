"""For all tests of streams: the tool, and a key for endpoints, which are on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.chat_server import KEY_VARIABLE
from titan_smf.commands import make_stream as tool
from titan_smf.commands.entry import exit_code

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "make_stream.py")


@pytest.fixture(autouse=True)
def key_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, "secret-key")


class ToolRun(NamedTuple):
    """How tools/make_stream.py ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def make_stream(capsys: pytest.CaptureFixture[str]) -> Callable[..., ToolRun]:
    """Runs tools/make_stream.py with the given arguments in this process."""

    def run(*args: str) -> ToolRun:
        capsys.readouterr()
        return ToolRun(exit_code(tool.main, args), *capsys.readouterr())

    return run
