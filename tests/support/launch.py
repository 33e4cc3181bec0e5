"""Run a test function on several gloo processes of this machine, and collect what it returns.

    def check_everything(rank: int, world_size: int, seed: int) -> float: ...

    def test_everything() -> None:
        results = run_on_ranks(check_everything, 4, 1234)

The imports of the trainer cost five seconds of CPU time, which every process would spend. So the
processes are forks of a server that has made these imports and nothing else: no thread runs in it
that a fork would miss (OpenBLAS and jemalloc prepare their own for forks). Forks cannot use a GPU,
and all hash strings alike; tests of killed runs start their processes as users do (`start_ranks`).
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

multiprocessing.set_forkserver_preload(["titan_smf.training.trainer"])


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Returns `[function(rank, world_size, *args) for every rank]`, each run in its own process.

    The processes form the default process group (gloo), have this process's environment and use one
    thread each. `function` must be importable (defined at the top of a module) and its results
    picklable.

    Raises:
        RuntimeError: a rank raised or died; the message holds the traceback of the first to do so.
        TimeoutError: not all ranks returned within `timeout` seconds.
    Either way no process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    environment = dict(os.environ)  # the server has that of the first launch
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                given = (rank, world_size, environment, f"{folder}/store", timeout, function, args)
                process = context.Process(target=_run_rank, args=(sender, *given))
                process.start()
                sender.close()  # the child holds the only sender: its death ends the pipe
                processes.append(process)
                pipes[receiver] = rank
            deadline = time.monotonic() + timeout
            while pipes:
                ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"ranks {sorted(pipes.values())}: no result in {timeout} s")
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    rank = pipes.pop(pipe)
                    results[rank] = _receive(pipe, rank)
            for process in processes:  # let them leave the process group in peace
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _receive(pipe: Connection, rank: int) -> Any:
    try:
        succeeded, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{result}")
    return result


def _run_rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    environment: dict[str, str],
    store: str,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            init_method=Path(store).as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # Plain pickle: multiprocessing's own would send tensors as handles that die with us.
        message = pickle.dumps((True, function(rank, world_size, *args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
