"""Short trainings for tests: their settings, runs on several ranks, and what the runs wrote."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Settings = dict[str, Any]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train_configs"
CONFIG = CONFIGS / "debug_pretrain.toml"
"""The configuration of a run whose settings have no `job.config`."""
SPARSE_FT: Settings = {"job.config": CONFIGS / "debug_sparse_ft.toml"}
FULL_FT: Settings = {"job.config": CONFIGS / "debug_full_ft.toml"}
LORA_FT: Settings = {"job.config": CONFIGS / "debug_lora_ft.toml"}
COUNTING: Settings = {"job.config": CONFIGS / "debug_idf.toml"}
EXACT: Settings = {
    "training.dtype": "float64",
    "training.mixed_precision_param": "float64",
    "training.mixed_precision_reduce": "float64",
    "memory.value_dtype": "float64",
}
SHORT: Settings = {
    "training.steps": 4,
    "lr_scheduler.warmup_steps": 2,
    "checkpoint.enable": "false",
    "validation.freq": 2,
    "metrics.enable_tensorboard": "false",
}
HSDP: Settings = {"parallelism.data_parallel_replicate_degree": 2}
SHARED_TABLE: Settings = {"memory.layers": "[1, 2]"}
TABLE_EACH: Settings = SHARED_TABLE | {"memory.share_values": "false"}
DENSE: Settings = {"memory.layers": "[]"}


def arguments(folder: Path, settings: Settings) -> list[str]:
    """The command line of a run in `folder`."""
    given = {"job.config": CONFIG, "job.dump_folder": folder} | settings
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def build(folder: Path, settings: Settings, counts: bool = False) -> Any:
    """A trainer. (Its imports are of no use to the process that starts the ranks.)"""
    from torch.distributed import get_world_size

    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.count_background import counting_config
    from titan_smf.training.trainer import Trainer

    config = load_config(arguments(folder, settings))
    if counts:
        config = counting_config(config, get_world_size())
    check(config, get_world_size())
    return Trainer(config)


def train(rank: int, ranks: int, folder: str, runs: dict[str, Settings]) -> None:
    """Run several trainings one after another in one process group."""
    for name, settings in runs.items():
        trainer = build(Path(folder) / name, settings)
        trainer.train()
        trainer.close()


def count(rank: int, ranks: int, folder: str, settings: Settings) -> None:
    """Count the background data."""
    from titan_smf.training.count_background import count_background

    trainer = build(Path(folder), COUNTING | settings, counts=True)
    assert count_background(trainer), "it was not asked to stop"
    trainer.close()


def metrics(folder: Path, name: str = "loss") -> list[float]:
    """The values of a metric, of each step that has it."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def selections(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "selections.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint: each rank's file holds a part of the rows."""
    files = sorted(folder.glob(f"checkpoints/step-{step}/*.safetensors"))
    parts = [load_file(file) for file in files]
    names = [name for name in parts[0] if name.startswith("model.")]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def start_ranks(ranks: int, *words: str) -> list[subprocess.Popen[str]]:
    """Start `python WORDS` as torchrun would, without torchrun in between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    everyone = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], code: int = 0) -> str:
    """Wait for all ranks; returns what rank 0 printed."""
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs[0]


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kill all ranks, which must not have ended before."""
    for process in processes:
        process.kill()
    finish(processes, code=-9)


def wait_for_step(folder: Path, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Return when a run has recorded a step."""
    deadline = time.monotonic() + 120
    file = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), "a rank ended early"
        if file.is_file() and f'"step": {step},' in file.read_text():
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")
