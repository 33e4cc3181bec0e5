"""Tests run on the CPU, several ranks on any machine; those marked `gpu` see its GPUs."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
