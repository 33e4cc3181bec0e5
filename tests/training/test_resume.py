"""A run that was killed goes on, on any number of ranks, with the losses of one that was not."""

import io
import json
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.support.launch import run_on_ranks
from tests.support.training_runs import (
    EXACT,
    HSDP,
    SHORT,
    Settings,
    arguments,
    finish,
    kill,
    metrics,
    start_ranks,
    train,
    wait_for_step,
)

STEPS = 40
TRAIN = ("-m", "titan_smf.train")
# In float64 another number of ranks changes no more than the last digits.
LONG = EXACT | {"training.steps": STEPS, "metrics.enable_tensorboard": "false"}
SAVED = SHORT | {"checkpoint.enable": "true", "lr_scheduler.decay_ratio": 0.0}
TWELVE = SAVED | {"training.global_batch_size": 12}
HALF: Settings = {"training.steps": 2}


def train_and_tell(rank: int, ranks: int, folder: str, settings: Settings) -> str:
    """A run in `folder`, and what it printed."""
    from titan_smf.runtime import configure_logging

    with redirect_stdout(io.StringIO()) as output:
        configure_logging()
        train(rank, ranks, str(Path(folder).parent), {Path(folder).name: settings})
    return output.getvalue()


def train_in_turn(rank: int, ranks: int, folder: str, runs: list[tuple[str, Settings]]) -> None:
    """Runs one after another, in which a later one may go on with an earlier one."""
    for name, settings in runs:
        train(rank, ranks, folder, {name: settings})


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "one line a step"
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in one go, and others in two, of which each launch here makes one part."""
    folder = tmp_path_factory.mktemp("runs")
    twice = [("straight", TWELVE), ("halves", TWELVE | HALF), ("halves", TWELVE)]
    exact, spread = SAVED | EXACT, SAVED | EXACT | HSDP
    rates = SAVED | {"lr_scheduler.decay_ratio": 0.5}
    other_rates = {"training.steps": 8, "optimizer.lr": 4e-3, "memory.value_lr": 8e-3}
    extended = [("extended", rates | {"optimizer.lr": 1e-3}), ("extended", rates | other_rates)]
    on_one = [(f"1/{name}", settings) for name, settings in twice]
    on_three = [(f"3/{name}", settings) for name, settings in twice]
    from_hsdp, to_hsdp = ("from HSDP/halves", exact), ("to HSDP/halves", spread)
    for ranks, parts in (
        (1, [*on_one, *extended, ("to HSDP/halves", exact | HALF)]),
        (3, on_three),
        (4, [("from HSDP/halves", spread | HALF), to_hsdp, ("to HSDP/straight", spread)]),
        (2, [from_hsdp, ("from HSDP/straight", exact), ("uninterrupted", LONG)]),
    ):
        run_on_ranks(train_in_turn, ranks, str(folder), parts, timeout=300)
    return folder


def test_killed_and_resumed_on_other_numbers_of_ranks(runs: Path, tmp_path: Path) -> None:
    processes = start_ranks(2, *TRAIN, *arguments(tmp_path, LONG))
    wait_for_step(tmp_path, 24, processes)
    kill(processes)
    assert len(losses(tmp_path)) < STEPS

    told = run_on_ranks(train_and_tell, 4, str(tmp_path), LONG, timeout=300)[0]
    assert "Resumed from step" in told
    resumed = losses(tmp_path)
    assert list(resumed) == list(range(1, STEPS + 1))
    assert resumed == pytest.approx(losses(runs / "uninterrupted"), rel=0, abs=1e-9)

    # Nothing is left to do, on one process, and nothing is trained again.
    assert "Nothing to do" in run_on_ranks(train_and_tell, 1, str(tmp_path), LONG)[0]
    assert losses(tmp_path) == resumed


def test_stop_request_saves_and_the_run_goes_on(runs: Path, tmp_path: Path) -> None:
    settings = LONG | {"checkpoint.interval": 1000}
    processes = start_ranks(2, *TRAIN, *arguments(tmp_path, settings))
    wait_for_step(tmp_path, 5, processes)
    processes[1].send_signal(signal.SIGTERM)  # one rank is told, all stop at the same step
    assert "Stopped on request" in finish(processes, code=75)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    told = finish(start_ranks(1, *TRAIN, *arguments(tmp_path, settings)))
    assert "Resumed from step" in told
    uninterrupted = losses(runs / "uninterrupted")
    assert losses(tmp_path) == pytest.approx(uninterrupted, rel=0, abs=1e-9)


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_resumed_on_as_many_ranks_is_bit_identical(runs: Path, ranks: str) -> None:
    for name in ("loss", "grad_norm", "lr"):
        straight = metrics(runs / ranks / "straight", name)
        assert len(straight) == 4
        assert metrics(runs / ranks / "halves", name) == straight


@pytest.mark.parametrize("change", ["from HSDP", "to HSDP"])
def test_resumed_in_another_placement(runs: Path, change: str) -> None:
    straight = metrics(runs / change / "straight")
    assert len(straight) == 4
    assert metrics(runs / change / "halves") == pytest.approx(straight, rel=0, abs=1e-10)


def test_a_resumed_run_has_the_schedule_and_rates_it_is_given(runs: Path) -> None:
    # Four steps of warmup 2 and decay 2, then steps 5 to 8 of a run of 8 with decay 4.
    assert metrics(runs / "extended", "lr") == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 0.5e-3, 4e-3, 3e-3, 2e-3, 1e-3]
    )
