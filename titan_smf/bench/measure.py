"""Time, memory and bytes measured fairly, and the table in which the results are printed."""

import ctypes
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    name: str
    value: float
    target: str = "-"
    note: str = ""


def median_ratio(numerator: Callable[[], Any], denominator: Callable[[], Any], runs: int) -> float:
    """Returns the ratio of two median times, see `median_seconds`."""
    top, bottom = median_seconds([numerator, denominator], runs)
    return top / bottom


def median_seconds(
    functions: Sequence[Callable[[], Any]], runs: int, at_least: float = 1
) -> list[float]:
    """Returns median times; the functions run in turns, after two runs to warm up.

    Short functions run more often than `runs`, until `at_least` seconds have passed: 0 where
    several ranks must run them equally often.
    """
    times: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    for run in itertools.count():
        if run >= runs + 2 and (time.perf_counter() - begin > at_least or run > 10 * runs):
            break
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if run >= 2:
                seconds.append(time.perf_counter() - start)
    return list(map(statistics.median, times))


def peak_growth(function: Callable[[], Any]) -> int:
    """How far the resident memory of this process rises above what it is now, in bytes.

    Memory that was freed before is first given back to the system, which then counts it again.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident_peak()
    function()
    return resident_peak() - before


def resident_peak() -> int:
    """This process's peak resident bytes; getrusage would begin with those of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class ReceivedBytes(TorchDispatchMode):
    """Counts the bytes that the collectives of this thread bring to this rank, by their names.

    What arrives from other ranks: of an all-to-all and an all-gather exactly that; an all-reduce
    counts as a ring's `2 (W - 1) / W` times its tensor.
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
