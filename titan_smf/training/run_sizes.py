"""What a run logs of its sizes before the first step."""

import logging

import torch.distributed as dist

from titan_smf.config.job import JobConfig
from titan_smf.model.llama import MemoryLlama, num_trainable, parameter_counts

logger = logging.getLogger("titan_smf")


def log_model(config: JobConfig, model: MemoryLlama, device: str, flops_per_token: float) -> None:
    """Logs ranks, parameters, what a step updates, and the table's part on this rank."""
    memory, sizes = model.model_args.memory, parameter_counts(model)
    logger.info("%s on %d x %s", config.job.description, dist.get_world_size(), device)
    logger.info(
        "Model: %s parameters, of which a token uses %s; %.3g MFLOP a token",
        f"{sizes.total:,}",
        f"{sizes.active:,}",
        flops_per_token / 1e6,
    )
    if config.finetune.method == "sparse_memory":
        logger.info(
            "A step updates at most %s rows, %s numbers",
            f"{config.selection.top_t:,}",
            f"{config.selection.top_t * memory.v_dim:,}",
        )
    else:
        logger.info("A step updates %s numbers", f"{num_trainable(model):,}")
    for table in model.value_tables():
        start, stop = table.row_range
        logger.info(
            "Value table: %s slots x %d; on this rank %s rows, %.1f MiB",
            f"{memory.num_slots:,}",
            memory.v_dim,
            f"{stop - start:,}",
            (stop - start) * memory.v_dim * table.values.element_size() / 2**20,
        )


def log_batch(config: JobConfig, micro_batches: int) -> None:
    """Logs the size of a global batch and the number of steps."""
    logger.info(
        "Batch: %d sequences of %d tokens in %d micro-batches; %d steps",
        micro_batches * config.training.local_batch_size * dist.get_world_size(),
        config.training.seq_len,
        micro_batches,
        config.training.steps,
    )
