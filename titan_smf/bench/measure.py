"""Timing two alternatives fairly, and the table in which the results are printed."""

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    name: str
    value: float
    target: str = "-"
    note: str = ""


def median_ratio(numerator: Callable[[], Any], denominator: Callable[[], Any], runs: int) -> float:
    """Returns the ratio of two median times; the two run in turns, after two runs to warm up.

    Short functions run more often than `runs`, until a second has passed.
    """
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    for run in itertools.count():
        if run >= runs + 2 and (time.perf_counter() - begin > 1 or run > 10 * runs):
            break
        for function, seconds in zip((numerator, denominator), times, strict=True):
            start = time.perf_counter()
            function()
            if run >= 2:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def random_slots(kind: str, num_slots: int, tokens: int, slots_per_token: int) -> Tensor:
    """Returns (T, K) slots: `uniform`, or `zipf` where slot i has probability about 1 / (i + 1),
    the slots being shuffled so that popular ones lie anywhere in the table."""
    share = torch.rand(tokens, slots_per_token, dtype=torch.float64)
    if kind == "uniform":
        return (share * num_slots).long()
    rank = (num_slots**share - 1).long().clamp(max=num_slots - 1)
    return torch.randperm(num_slots)[rank]


def table(measures: list[Measure]) -> str:
    """Returns the measures as aligned columns."""
    lines = [("measure", "value", "target", "note")]
    lines += [(m.name, f"{m.value:.3g}", m.target, m.note) for m in measures]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Returns `function(rank, *args)` of every rank of a fresh gloo group of processes."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(results, f"{folder}/store", rank, world_size, function, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank failed, see above: {function.__name__}")
    return [result for _, result in sorted(results.get() for _ in processes)]


def _rank(
    results: Any,
    store: str,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    results.put((rank, function(rank, *args)))
    dist.destroy_process_group()
