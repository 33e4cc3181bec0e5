"""Whether a run goes on from a checkpoint of its own, and which checkpoints fit it."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from titan_smf.checkpoint.checkpointer import Checkpointer
from titan_smf.checkpoint.run_folder import check_not_overwritten
from titan_smf.config.job import JobConfig
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import CheckpointError, ConfigError
from titan_smf.model.args import SIZES, MemoryLlamaArgs

logger = logging.getLogger("titan_smf")


def resume(config: JobConfig, folder: Path, checkpoints: Checkpointer) -> bool:
    """Load the newest checkpoint in a run's folder, or the one asked for, if there is any.

    Returns:
        whether a checkpoint was loaded; otherwise the run has not begun.

    Raises:
        CheckpointError, ConfigError: the run has begun and cannot go on as asked.
    """
    enabled, step = config.checkpoint.enable, config.checkpoint.load_step
    saved = checkpoints.latest() if enabled else None
    if step != -1:
        if not enabled:
            raise ConfigError("checkpoint.load_step", step, "checkpoint.enable = true beside it")
        if saved is not None and saved > step:
            raise CheckpointError(
                f"checkpoint.load_step {step}: {checkpoints.folder} holds the later step {saved}, "
                "which a restart would take; move later steps away, or start in a new "
                "job.dump_folder with checkpoint.initial_load_path"
            )
        saved = step
    if saved is None:
        check_not_overwritten(folder, checkpoints.folder, enabled)
        return False
    checkpoints.load(saved)
    logger.info("Resumed from step %d in %s", saved, checkpoints.folder)
    return True


def run_identity(config: JobConfig, args: MemoryLlamaArgs, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a checkpoint must share with a run to fit it, as `Checkpointer` has it."""
    settings = dataclasses.asdict(args)
    return {
        "weights": {
            "model": {name: settings[name] for name in (*SIZES, "vocab_size", "memory")},
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        },
        "adapters": dataclasses.asdict(config.lora) if config.finetune.method == "lora" else None,
        "training": {"dtype": config.training.dtype, "method": config.finetune.method},
    }
