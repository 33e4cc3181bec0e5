"""Measure time, memory and received bytes fairly, on one process or on several ranks."""

import ctypes
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from titan_smf.config.job import JobConfig, load_config

TRAIN_CONFIGS = Path(__file__).parents[2] / "train_configs"
SETTINGS = tomllib.loads(Path(__file__).with_name("settings.toml").read_text())
"""Settings of models and runs by name."""

ACCESS_KINDS = ("uniform", "zipf")
"""How the accesses of `random_slots` are distributed."""


@dataclass(frozen=True)
class Measure:
    """One result, a ratio."""

    name: str
    value: float
    target: str = "-"
    note: str = ""


def median_ratio(numerator: Callable[[], Any], denominator: Callable[[], Any], runs: int) -> float:
    """Return the ratio of two median times, see `median_seconds`."""
    top, bottom = median_seconds([numerator, denominator], runs)
    return top / bottom


def median_seconds(
    functions: Sequence[Callable[[], Any]], runs: int, at_least: float = 1, warm_up: int = 2
) -> list[float]:
    """Time the functions in turns, after some runs to warm up; return each one's median.

    Args:
        runs: timed runs of each function; short functions run more often, up to ten times that,
            until `at_least` seconds have passed.
        at_least: 0 where several ranks must run the functions equally often.
    """
    times: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    for run in itertools.count():
        if run >= runs + warm_up and (time.perf_counter() - begin > at_least or run > 10 * runs):
            break
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if run >= warm_up:
                seconds.append(time.perf_counter() - start)
    return list(map(statistics.median, times))


def peak_growth(function: Callable[[], Any]) -> int:
    """Return how far this process's resident memory rises while the function runs, in bytes.

    Memory freed before is first given back to the system, so that using it again counts.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident_peak()
    function()
    return resident_peak() - before


def resident_peak() -> int:
    """Return this process's peak resident bytes; getrusage would start from its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class ReceivedBytes(TorchDispatchMode):
    """Count the bytes that this rank receives from others, by collective, in this thread.

    All-to-all and all-gather count what arrives; all-reduce counts `2 (W - 1) / W` times its
    tensor, as in a ring.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.received[name] += _received(name, args)
        return func(*args, **(kwargs or {}))


def _received(name: str, args: Any) -> int:
    """Return the bytes that one call of a collective brings to this rank."""
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    group = dist.ProcessGroup.unbox(boxed)
    rank, W = group.rank(), group.size()
    if name == "alltoall_base_":
        output, _, _, sizes = args[:4]
        return (sum(sizes) - sizes[rank]) * output[:1].nbytes if len(output) else 0
    if name == "allgather_":
        return sum(tensor.nbytes for tensor in args[1]) * (W - 1)
    if name == "_allgather_base_":
        return args[1].nbytes * (W - 1)
    if name == "allreduce_":
        return sum(tensor.nbytes for tensor in args[0]) * 2 * (W - 1) // W
    raise NotImplementedError(f"bytes of {name}")


def random_slots(kind: str, num_slots: int, tokens: int, slots_per_token: int) -> Tensor:
    """Return random slots, int64 (T, K).

    Args:
        kind: `uniform`, or `zipf`: the i-th most popular slot has probability about 1 / (i + 1),
            and popular slots lie anywhere in the table.
    """
    share = torch.rand(tokens, slots_per_token, dtype=torch.float64)
    if kind == "uniform":
        return (share * num_slots).long()
    rank = (num_slots**share - 1).long().clamp(max=num_slots - 1)
    return torch.randperm(num_slots)[rank]


def update_rows(optimizer: Optimizer, values: Tensor, rows: Tensor) -> None:
    """Update only these rows of `values` by a dense optimizer, which masks the dense gradient."""
    assert values.grad is not None
    mask = torch.zeros(len(values), 1)
    mask[rows] = 1
    values.grad.mul_(mask)
    optimizer.step()


def load_settings(file: str, folder: str, settings: Mapping[str, Any]) -> JobConfig:
    """Return the configuration of a run in `folder`: `train_configs/FILE.toml` and `settings`."""
    words = ["--job.config", str(TRAIN_CONFIGS / f"{file}.toml"), "--job.dump_folder", folder]
    for key, value in settings.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return load_config(words)


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return `function(rank, *args)` of every rank of a fresh gloo group of processes."""
    # No process takes two ranks: each waits for the others before it runs the function.
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world_size, multiprocessing.get_context("spawn")) as processes,
    ):
        calls = [
            processes.submit(_call_on_rank, f"{folder}/store", rank, world_size, function, args)
            for rank in range(world_size)
        ]
        return [call.result() for call in calls]


def _call_on_rank(
    store: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    logging.disable()  # what torch and torchtitan say at each start
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    result = function(rank, *args)
    dist.destroy_process_group()
    return result
