"""Metrics of a run: `metrics.jsonl`, the same for TensorBoard, progress lines; its sizes, logged.

One line of `metrics.jsonl` is one step: `{"step": 20, "loss": 3.2, ...}`. A run that resumes at an
earlier step drops the lines after it, so the file reads like that of an uninterrupted run.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from titan_smf.config.job import JobConfig
from titan_smf.model.args import num_trainable
from titan_smf.model.llama import MemoryLlama
from titan_smf.progress import format_duration
from titan_smf.runtime import rank
from titan_smf.storage import drop_lines_after
from titan_smf.torchtitan_api import MetricsProcessor

METRICS_FILE = "metrics.jsonl"
PREVIOUS_FILE = "metrics.previous.jsonl"
"""Metrics of a run in this folder that ended before it saved a checkpoint."""

logger = logging.getLogger("titan_smf")


def log_sizes(config: JobConfig, model: MemoryLlama, micro_batches: int) -> None:
    """Log the sizes of the model, of a step, of this rank's part of the tables, and of a batch.

    Args:
        micro_batches: of a step on each rank; 0 without training data.
    """
    args = model.model_args
    memory, sizes = args.memory, args.parameter_counts(model)
    ranks, top_t = dist.get_world_size(), config.selection.top_t
    _, flops_per_token = args.get_nparams_and_flops(model, config.training.seq_len)
    device = model.tok_embeddings.weight.device.type
    logger.info(f"{config.job.description} on {ranks} x {device}")
    logger.info(
        f"Model: {sizes.total:,} parameters, of which a token uses {sizes.active:,}; "
        f"{flops_per_token / 1e6:.3g} MFLOP per token"
    )
    if config.finetune.method == "sparse_memory":
        trainable = f"at most {top_t * memory.v_dim:,}, in {top_t:,} rows"
    else:
        trainable = f"{num_trainable(model):,}"
    logger.info(f"Trainable parameters per step: {trainable}")
    for table in model.value_tables():
        local = table.local_values()
        logger.info(
            f"Value table: {memory.num_slots:,} slots x {memory.v_dim}; on this rank "
            f"{len(local):,} rows, {local.nbytes / 2**20:.1f} MiB"
        )
    if micro_batches:
        training = config.training
        logger.info(
            f"Batch: {micro_batches * training.local_batch_size * ranks} sequences of "
            f"{training.seq_len} tokens in {micro_batches} micro-batches; {training.steps} steps"
        )


class RunMetrics(MetricsProcessor):
    """torchtitan's metrics processor with this project's names and files.

    `start` must be called before the first `record`. Only rank 0 writes.
    """

    train_seconds = 0.0
    train_steps = 0
    seconds_per_step = 0.0
    file: Any = None
    writer: SummaryWriter | None = None

    def start(self, config: JobConfig, step: int) -> None:
        """Open the files of a run that goes on after `step`."""
        if rank() != 0:
            return
        folder = Path(config.job.dump_folder)
        if step == 0 and (folder / METRICS_FILE).is_file():
            (folder / METRICS_FILE).replace(folder / PREVIOUS_FILE)
        drop_lines_after(folder / METRICS_FILE, step)
        self.file = (folder / METRICS_FILE).open("a", buffering=1)
        if config.metrics.enable_tensorboard:
            path = folder / config.metrics.save_tb_folder
            self.writer = SummaryWriter(str(path), purge_step=step + 1)

    @contextmanager
    def timed_step(self) -> Iterator[None]:
        """Count the time inside as training time; the rest (saving, evaluation) is not."""
        begin = time.perf_counter()
        yield
        self.train_seconds += time.perf_counter() - begin
        self.train_steps += 1

    def speed(self) -> dict[str, float]:
        """Return `tokens_per_second` of all ranks and `step_seconds`, since the last call."""
        seconds, steps = self.train_seconds, max(self.train_steps, 1)
        tokens = self.ntokens_since_last_log * self.parallel_dims.world_size
        self.ntokens_since_last_log, self.train_seconds, self.train_steps = 0, 0.0, 0
        self.data_loading_times.clear()
        per_step, before = seconds / steps, self.seconds_per_step
        # The first window holds compilation and first allocations: later ones replace it.
        self.seconds_per_step = 0.8 * before + 0.2 * per_step if before else per_step
        return {
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "step_seconds": per_step,
        }

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step's values everywhere and print a line of progress."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        logger.info(self._line(step, values))

    def close(self) -> None:
        """Flush and close the files."""
        for output in (self.file, self.writer):
            if output is not None:
                output.close()
        super().close()

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        total = self.job_config.training.steps
        parts = [f"step {step}/{total}"]
        parts += [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
        parts += [
            f"{name.removeprefix('evaluation/')} {value:.4f}"
            for name, value in values.items()
            if name.startswith("evaluation/")
        ]
        left = (total - step) * self.seconds_per_step
        return "  ".join([*parts, f"left {format_duration(left)}"])


_SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad norm {:.3g}",
    "lr": "lr {:.2e}",
    "memory/slots_used_fraction": "slots used {:.1%}",
    "sparse/rows_updated": "rows {:.0f}",
    "sparse/selected_access_share": "of accesses {:.1%}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
