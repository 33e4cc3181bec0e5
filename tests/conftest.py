"""Tests run on the CPU, several ranks on any machine; those marked `gpu` see its GPUs.

A test that starts processes is marked `launches`: by its code, which is followed through the tests'
own functions and fixtures, or by hand where the package starts them. `--fast` leaves these tests
out, and lets no other start a process.
"""

import os
import subprocess
from inspect import isclass, isfunction
from itertools import chain
from multiprocessing.process import BaseProcess
from types import CodeType
from typing import Any, NoReturn

import pytest

LAUNCHERS = {"run_on_ranks", "subprocess", "multiprocessing"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no process")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    pytest.fail("starts a process with --fast: mark the test by @pytest.mark.launches")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = chain(*item._fixtureinfo.name2fixturedefs.values())
            if starts_processes([item.function, *(each.func for each in fixtures)]):
                item.add_marker("launches")
    if config.option.fast:
        subprocess.Popen.__init__ = _refuse  # type: ignore[method-assign]
        BaseProcess.start = _refuse  # type: ignore[method-assign]
        launching = [item for item in items if item.get_closest_marker("launches")]
        items[:] = [item for item in items if item not in launching]
        config.hook.pytest_deselected(items=launching)


def starts_processes(functions: list[Any]) -> bool:
    """Say whether functions use a launcher, or anything of the tests that they use does."""
    todo, seen = list(functions), set()
    while todo:
        thing = todo.pop()
        if thing in seen:
            continue
        seen.add(thing)
        if isclass(thing):
            used = list(vars(thing).values())
        else:
            names = _names(thing.__code__)
            if names & LAUNCHERS:
                return True
            used = [thing.__globals__.get(name) for name in names]
        todo += [
            each
            for each in used
            if (isfunction(each) or isclass(each)) and each.__module__.startswith("tests.")
        ]
    return False


def _names(code: CodeType) -> set[str]:
    """Return all global names and attributes that code uses, in the functions inside it too."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
