"""A run that was killed goes on, on any number of ranks, with the losses of one that was not."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_on_ranks
from tests.training.test_training import CONFIG, EXACT, HSDP, SHORT, arguments, metrics, train

STEPS = 40


TRAIN = ("-m", "titan_smf.train", "--job.config", str(CONFIG))


def start_ranks(
    ranks: int, *words: str, program: Sequence[str] = TRAIN
) -> list[subprocess.Popen[str]]:
    """Start `python PROGRAM WORDS` as torchrun would, without torchrun in between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> str:
    """Wait for all ranks; returns what rank 0 printed."""
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs[0]


# In float64 another number of ranks changes no more than the last digits.
LONG = EXACT | {"training.steps": STEPS, "metrics.enable_tensorboard": "false"}


def settings(folder: Path) -> list[str]:
    return arguments(folder, LONG)[2:]


def train_and_tell(rank: int, ranks: int, folder: str, settings: dict[str, Any]) -> str:
    """A run in `folder`, and what it printed."""
    from titan_smf.runtime import configure_logging

    with redirect_stdout(io.StringIO()) as output:
        configure_logging()
        train(rank, ranks, str(Path(folder).parent), {Path(folder).name: settings})
    return output.getvalue()


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "one line a step"
    return {line["step"]: line["loss"] for line in lines}


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), "a rank ended early"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_on_ranks(train, 2, str(folder), {"run": LONG}, timeout=300)
    return losses(folder / "run")


def test_killed_and_resumed_on_other_numbers_of_ranks(
    uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    processes = start_ranks(2, *settings(tmp_path))
    wait_for_step(tmp_path, 24, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes, code=-signal.SIGKILL)
    assert len(losses(tmp_path)) < STEPS

    told = run_on_ranks(train_and_tell, 4, str(tmp_path), LONG, timeout=300)[0]
    assert "Resumed from step" in told
    resumed = losses(tmp_path)
    assert list(resumed) == list(range(1, STEPS + 1))
    assert resumed == pytest.approx(uninterrupted, rel=0, abs=1e-9)

    # Nothing is left to do, on one process, and nothing is trained again.
    assert "Nothing to do" in run_on_ranks(train_and_tell, 1, str(tmp_path), LONG)[0]
    assert losses(tmp_path) == resumed


def test_stop_request_saves_and_the_run_goes_on(
    uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    words = [*settings(tmp_path), "--checkpoint.interval", "1000"]
    processes = start_ranks(2, *words)
    wait_for_step(tmp_path, 5, processes)
    processes[1].send_signal(signal.SIGTERM)  # one rank is told, all stop at the same step
    output = finish(processes, code=75)
    assert "Stopped on request" in output
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    finish(start_ranks(1, *words))
    assert losses(tmp_path) == pytest.approx(uninterrupted, rel=0, abs=1e-9)


def train_twice(rank: int, ranks: int, folder: str) -> None:
    """Four steps in one go, and two steps with another two after a restart."""
    saved = SHORT | {"checkpoint.enable": "true", "lr_scheduler.decay_ratio": 0.0}
    saved |= {"training.global_batch_size": 12}
    train(rank, ranks, folder, {"straight": saved})
    train(rank, ranks, folder, {"halves": saved | {"training.steps": 2}})
    train(rank, ranks, folder, {"halves": saved})


@pytest.mark.parametrize("ranks", [1, 3])
def test_resumed_on_as_many_ranks_is_bit_identical(ranks: int, tmp_path: Path) -> None:
    run_on_ranks(train_twice, ranks, str(tmp_path))
    for name in ("loss", "grad_norm", "lr"):
        assert metrics(tmp_path / "halves", name) == metrics(tmp_path / "straight", name)


@pytest.mark.parametrize(
    ("before", "after"), [((4, HSDP), (2, {})), ((1, {}), (4, HSDP))], ids=["from HSDP", "to HSDP"]
)
def test_resumed_in_another_placement(
    before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]], tmp_path: Path
) -> None:
    saved = SHORT | EXACT | {"checkpoint.enable": "true", "lr_scheduler.decay_ratio": 0.0}
    for (ranks, placement), run, steps in (
        (after, "straight", 4),
        (before, "halves", 2),
        (after, "halves", 4),
    ):
        settings = saved | placement | {"training.steps": steps}
        run_on_ranks(train, ranks, str(tmp_path), {run: settings})
    straight = metrics(tmp_path / "straight")
    assert metrics(tmp_path / "halves") == pytest.approx(straight, rel=0, abs=1e-10)


def train_with_other_rates(rank: int, ranks: int, folder: str) -> None:
    """A finished run that is extended, with other rates."""
    saved = SHORT | {"checkpoint.enable": "true", "lr_scheduler.decay_ratio": 0.5}
    train(rank, ranks, folder, {"run": saved | {"optimizer.lr": 1e-3}})
    longer = {"training.steps": 8, "optimizer.lr": 4e-3, "memory.value_lr": 8e-3}
    train(rank, ranks, folder, {"run": saved | longer})


def test_a_resumed_run_has_the_schedule_and_rates_it_is_given(tmp_path: Path) -> None:
    run_on_ranks(train_with_other_rates, 1, str(tmp_path))
    # Four steps of warmup 2 and decay 2, then steps 5 to 8 of a run of 8 with decay 4.
    assert metrics(tmp_path / "run", "lr") == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 0.5e-3, 4e-3, 3e-3, 2e-3, 1e-3]
    )
