"""The optimizers of a run, in torchtitan's container; to add one, extend the class that fits."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from titan_smf.config.job import JobConfig
from titan_smf.errors import CheckpointError
from titan_smf.model.llama import MemoryLlama
from titan_smf.sparse.row_optimizer import RowAdamW, RowOptimizer, RowSGD
from titan_smf.torchtitan_api import OptimizersContainer

ROWS_SUFFIX = ".rows"
"""Of safetensors files with the state of rows, which are no tensors of the whole model."""


class AdamWithValues(OptimizersContainer):
    """Adam or AdamW in two groups: the value tables with a rate of their own, and the rest."""

    def __init__(self, model: MemoryLlama, config: JobConfig) -> None:
        settings, memory = config.optimizer, config.memory
        shared = {
            "lr": settings.lr,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "fused": settings.implementation == "fused",
            "foreach": settings.implementation == "foreach",
        }
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        values = [p for name, p in learning if name.startswith("tables.")]
        rest = [p for name, p in learning if not name.startswith("tables.")]
        groups: list[dict[str, Any]] = [
            {"params": rest},
            {"params": values, "lr": memory.value_lr, "weight_decay": memory.value_weight_decay},
        ]
        groups = [group for group in groups if group["params"]]
        self.model_parts = [model]
        self.optimizers = [getattr(torch.optim, settings.name)(groups, **shared)]
        self._post_init(rest + values, shared)


class RowOptimizers(OptimizersContainer):
    """The row optimizers of all tables: `optimizer.name` with the rate and decay of `[memory]`.

    They keep the base values of the rows they change, for the run's patch. A checkpoint holds the
    rows' state in files of each rank, and nothing of it by parameter.
    """

    optimizers: list[RowOptimizer]

    def __init__(self, model: MemoryLlama, config: JobConfig) -> None:
        settings, memory = config.optimizer, config.memory
        betas = settings.beta1, settings.beta2
        rate, decay = memory.value_lr, memory.value_weight_decay
        tables = list(model.value_tables())
        self.model_parts = [model]
        if settings.name == "SGD":
            self.optimizers = [RowSGD(table, rate, decay, keep_base=True) for table in tables]
        else:
            self.optimizers = [
                RowAdamW(table, rate, betas, settings.eps, decay, keep_base=True)
                for table in tables
            ]
        self._post_init([table.values for table in tables], {})

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: see `save_files`."""
        return {}

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: each step makes its gradients anew."""

    def save_files(self, folder: Path) -> None:
        """Write the state of the rows this rank owns; of replicas the first one does."""
        for index, optimizer in enumerate(self.optimizers):
            if optimizer.table.is_first_replica:
                path = folder / f"rows-{index}-{optimizer.table.row_range[0]}{ROWS_SUFFIX}"
                safetensors.torch.save_file(optimizer.state_tensors(), path)

    def load_files(self, folder: Path) -> None:
        """Take the state of the rows this rank owns from the files of all ranks.

        Raises:
            CheckpointError: it is the state of another kind of optimizer.
        """
        for index, optimizer in enumerate(self.optimizers):
            files = sorted(folder.glob(f"rows-{index}-*{ROWS_SUFFIX}"))
            try:
                optimizer.load_state_tensors(
                    _read_rows(file, *optimizer.table.row_range) for file in files
                )
            except ValueError as error:
                raise CheckpointError(
                    f"{folder}: {error}; go on with the optimizer.name of that run, or start a new "
                    "one from its weights by checkpoint.initial_load_path"
                ) from None


def _read_rows(file: Path, start: int, stop: int) -> dict[str, Tensor]:
    """Read a file's entries for `start <= row < stop`, and no others."""
    with safetensors.safe_open(file, "pt") as stored:
        rows = stored.get_tensor("rows")
        first, end = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
        return {name: stored.get_slice(name)[first:end] for name in stored.keys()}  # noqa: SIM118
