"""The benchmark prints as it goes, and starts at once."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from titan_smf.bench import measure, sparse
from titan_smf.bench import step as whole
from titan_smf.bench.measure import Measure
from titan_smf.commands.bench import GROUPS, load_group, print_measures

ROOT = Path(__file__).resolve().parents[2]


def test_a_measure_is_printed_before_the_next_one_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # what was not flushed raises

    def measures(runs: int) -> Iterator[Measure]:
        assert "running slow ..." in os.read(reader, 10_000).decode()
        yield Measure("first / plain", 1 / runs, "0.3", "a note")
        line = os.read(reader, 10_000).decode()
        assert line.split()[1:] == ["first", "/", "plain", "0.333", "0.3", "a", "note"]
        yield Measure("second", 12345.6)

    with os.fdopen(reader, "rb"), os.fdopen(writer, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        print_measures({"slow": measures}, runs=3)
        second, end = os.read(reader, 10_000).decode().splitlines()
    assert second.split()[1:] == ["second", "1.23e+04", "-"]
    assert end.startswith("2 measures in 0:")


@pytest.mark.parametrize("name", GROUPS)
def test_each_group_gives_its_measures_one_by_one(name: str) -> None:
    assert inspect.isgeneratorfunction(load_group(name))


def test_steps_that_are_timed_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def call_once(functions: Sequence[Callable[[], Any]], runs: int) -> list[float]:
        for function in functions:
            function()
        return [1.0] * len(functions)

    monkeypatch.setattr(measure, "median_seconds", call_once)
    monkeypatch.setattr(sparse, "LARGE", 1 << 13)
    monkeypatch.setattr(sparse, "SMALL", 1 << 12)
    monkeypatch.setattr(sparse, "on_ranks", lambda function, ranks, *args: [1 << 20])
    assert len({each.name for each in sparse.sparse(runs=1)}) == 11
    for step in (whole.build_sparse_step(32, "AdamW"), whole.build_dense_step(32)):
        step()


def test_help_is_printed_without_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['bench.py', '--help']\n"
        "try: runpy.run_path('tools/bench.py', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--only" in done.stdout
    assert done.stdout.endswith("False\n")
