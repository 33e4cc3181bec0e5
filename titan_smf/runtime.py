"""Start-up of every entry point: torchtitan on any device, ranks, logging, stop requests, exits.

torchtitan 0.2.2 expects an accelerator and triton at import time. `prepare_torchtitan` makes it
importable on a machine without either and must run before anything else imports torchtitan.
"""

import importlib
import importlib.util
import logging
import os
import platform
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from titan_smf.errors import EXIT_USER_ERROR, UserError

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a checkpoint was saved, start again to go on

logger = logging.getLogger("titan_smf")


class _CPUDevice:
    """The calls that torchtitan makes on a device module, answered for the CPU.

    "Device memory" is the resident memory of this process, in bytes.
    """

    def set_device(self, device: object) -> None: ...
    def synchronize(self) -> None: ...
    def empty_cache(self) -> None: ...
    def reset_peak_memory_stats(self) -> None: ...

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return os.cpu_count() or 1

    def get_device_name(self, device: object = None) -> str:
        return platform.processor() or platform.machine()

    def get_device_properties(self, device: object = None) -> Any:
        class Properties:
            total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

        return Properties

    def memory_stats(self, device: object = None) -> dict[str, int]:
        peak = peak_resident_bytes()
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}


def peak_resident_bytes() -> int:
    """The largest resident memory this process has had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _cpu_answers() -> Iterator[None]:
    """Let torch name the CPU as the available device, with a module that torchtitan can use."""
    import torch._utils as torch_utils

    saved = torch_utils._get_available_device_type, torch_utils._get_device_module
    torch_utils._get_available_device_type = lambda: "cpu"
    torch_utils._get_device_module = lambda device_type: _CPUDevice()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch_utils._get_available_device_type, torch_utils._get_device_module = saved


def prepare_torchtitan() -> None:
    """Make `import torchtitan` work on this machine, with or without an accelerator.

    Raises:
        RuntimeError: torchtitan was imported before with a device that does not exist.
    """
    if not torch.accelerator.is_available():
        if "torchtitan.tools.utils" in sys.modules:
            if sys.modules["torchtitan.tools.utils"].device_type != "cpu":
                raise RuntimeError("call prepare_torchtitan() before anything imports torchtitan")
            return
        if importlib.util.find_spec("triton") is None:
            # Triton kernels of mixture-of-experts layers, which nothing here uses.
            kernels = ModuleType("torchtitan.models.moe.kernels")
            kernels.__dict__["generate_permute_indices"] = None
            sys.modules["torchtitan.models.moe.kernels"] = kernels
        with _cpu_answers():
            importlib.import_module("torchtitan.tools.utils")
    from torchtitan.config import TORCH_DTYPE_MAP

    TORCH_DTYPE_MAP["float64"] = torch.float64  # exactness checks on the CPU


def rank() -> int:
    """This process's rank, before or after the process group exists."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, before or after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_default_ranks() -> None:
    """Give a process that was launched plainly the environment of a world of one rank."""
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
    """Every process of this machine needs a GPU of its own, where there are any.

    Raises:
        UserError: there are fewer.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.accelerator.is_available() and processes > torch.accelerator.device_count():
        raise UserError(
            f"{processes} processes on this machine, which has {torch.accelerator.device_count()} "
            "GPUs; start one process for each GPU, or hide them to run on the CPU: "
            "CUDA_VISIBLE_DEVICES= torchrun ..."
        )


# What torchtitan and torch say at each start although nothing is wrong: how they look for a GPU's
# name, set NCCL up, keep the process group of a run before, turn autocast off, seed DTensors on a
# CPU, treat meshes of one rank, set a resumed schedule to its step, and return views, which
# nothing here writes into.
_LOGGED_NOISE = (
    "Error running lspci",
    "Peak flops undefined",
    "ENV[",
    "torch.distributed is already initialized",
)
_WARNED_NOISE = (
    "In CPU autocast",
    "Set timeout is now only",
    "DTensor .* may not have complete",
    r"Detected call of `lr_scheduler.step\(\)`",
    "FSDP2-wrapped module .* returned a view",
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
    """Notes SIGTERM, SIGINT and SIGUSR1 so that the loop can save and stop at a step's end.

    A second SIGINT stops at once. Ranks agree on stopping through `requested` in a collective that
    the step makes anyway; the flag alone is this process's.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        """Put the signal handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _report(error: UserError) -> None:
    """Print the message once: rank 0 at once; another rank only if rank 0 did not end the run."""
    if rank() != 0:
        # torchrun ends this process as soon as rank 0 has exited with the same error.
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)


def end_process(code: int) -> NoReturn:
    """Exit at once, without the destructors of C++ objects.

    Threads of gloo may outlive their group and then abort the process in these destructors, after
    all is done: seen in one of some forty runs on four ranks.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_entry_point(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return the exit code; a `UserError` becomes one message and code 2."""
    set_default_ranks()
    configure_logging()
    try:
        check_devices()
        code = main(argv) or 0
    except UserError as error:
        _report(error)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        return 1
    # Only here: after an error other ranks may still wait in a collective, and so would this one.
    if dist.is_initialized():
        dist.destroy_process_group()
    return code
