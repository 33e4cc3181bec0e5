"""What every process of a run shares: ranks, logging, stop requests, exit codes."""

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from titan_smf.errors import UserError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a checkpoint was saved, start again to go on

logger = logging.getLogger("titan_smf")


def peak_resident_bytes() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank() -> int:
    """Return this process's rank, before or after the process group exists."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, before or after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Say whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_ranks() -> None:
    """Return once every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


def from_first_rank(look: Callable[[], Any]) -> Any:
    """Return on every rank what `look` returns on rank 0, or raise its `UserError`. Collective.

    Ranks may see a shared file system at different moments.
    """
    answer: list[Any] = [None]
    if is_first_rank():
        try:
            answer = [look()]
        except UserError as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def from_all_ranks(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values that all ranks (of a group) give, in rank order. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_any_rank(here: bool, device: torch.device) -> bool:
    """Whether `here` is true on any rank. Collective."""
    anywhere = torch.tensor(int(here), device=device)
    dist.all_reduce(anywhere)
    return bool(anywhere.item())


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def set_default_ranks() -> None:
    """Set the environment of a world of one rank, unless torchrun has set one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def check_devices() -> None:
    """Raise a UserError unless each process of this machine has a GPU of its own, or none any."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.accelerator.is_available() and processes > torch.accelerator.device_count():
        raise UserError(
            f"{processes} processes on this machine, which has {torch.accelerator.device_count()} "
            "GPUs; start one process for each GPU, or hide them to run on the CPU: "
            "CUDA_VISIBLE_DEVICES= torchrun ..."
        )


# What torchtitan and torch say at each start although nothing is wrong.
_LOGGED_NOISE = (
    "Error running lspci",  # looks for a GPU's name
    "Peak flops undefined",
    "ENV[",  # sets NCCL up
    "torch.distributed is already initialized",  # by a run before in this process
)
_WARNED_NOISE = (
    "In CPU autocast",  # which is turned off
    "Set timeout is now only",  # meshes of one rank
    "DTensor .* may not have complete",  # seeds DTensors on a CPU
    r"Detected call of `lr_scheduler.step\(\)`",  # sets a resumed schedule to its step
    "FSDP2-wrapped module .* returned a view",  # which nothing here writes into
)


def configure_logging() -> None:
    """Print this project's messages once, from rank 0; warnings come from every rank."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not record.getMessage().startswith(_LOGGED_NOISE))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # torchtitan logs through the root logger, on every rank; its start-up chatter stays out.
    root.setLevel(logging.WARNING if rank() == 0 else logging.ERROR)
    if rank() != 0:
        warnings.simplefilter("ignore")  # rank 0 says the same
    for message in _WARNED_NOISE:
        warnings.filterwarnings("ignore", message=message)
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1 so that the loop can save and stop at a step's end.

    Signals are noted inside `with`. A second SIGINT stops at once. `requested` is this process's
    alone: ranks agree on stopping in a collective that the step makes anyway.
    """

    requested = False

    def __enter__(self) -> None:
        self._previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def end_process(code: int) -> NoReturn:
    """Exit at once, without the destructors of C++ objects.

    Threads of gloo may outlive their group and then abort the process in these destructors, after
    all is done: seen in one of some forty runs on four ranks.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
