"""Everything that this project takes from torchtitan 0.2.2, and what for.

No other module of the package imports torchtitan, so a move to another version is made here; the
test of the set-up lists what a new version changed. torchtitan expects an accelerator and triton
at import time: this module makes it importable on a machine without either, and must therefore be
imported before anything else imports torchtitan.
"""

# ruff: noqa: E402, F401, I001  imports for other modules, grouped by them, after the preparation

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from titan_smf.runtime import peak_resident_bytes


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


def _prepare_torchtitan() -> None:
    """Make `import torchtitan` work on this machine, with or without an accelerator.

    Raises:
        RuntimeError: torchtitan was imported before with a device that does not exist.
    """
    if not torch.accelerator.is_available():
        if "torchtitan.tools.utils" in sys.modules:
            if sys.modules["torchtitan.tools.utils"].device_type != "cpu":
                raise RuntimeError(
                    "import titan_smf.torchtitan_api before anything imports torchtitan"
                )
            return
        if importlib.util.find_spec("triton") is None:
            # Triton kernels of mixture-of-experts layers, which nothing here uses.
            kernels = ModuleType("torchtitan.models.moe.kernels")
            kernels.__dict__["generate_permute_indices"] = None
            sys.modules["torchtitan.models.moe.kernels"] = kernels
        with _cpu_answers():
            importlib.import_module("torchtitan.tools.utils")


_prepare_torchtitan()

# config/: the sections that ours extend
import torchtitan.config.job_config as titan_sections
from torchtitan.config import JobConfig as TitanJobConfig

# model/args.py, model/llama.py: the sizes and blocks of the Llama, which ours extend
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.model import (
    Attention,
    FeedForward,
    Transformer,
    TransformerBlock,
)

# model/parallelize.py: meshes, activation checkpointing, FSDP2, dtypes by name
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list as op_sac_save_list
from torchtitan.models.llama3.infra.parallelize import apply_fsdp

# training/: the trainer that ours extends, and the parts it is built of
import torchtitan.train as torchtitan_train
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling

# bench/: torchtitan's own Llama, to compare with
from torchtitan.models.llama3 import get_train_spec

TORCH_DTYPE_MAP["float64"] = torch.float64  # exactness checks on the CPU
