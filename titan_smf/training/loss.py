"""The training loss."""

from typing import Any

import torch
import torch.nn.functional as F

from titan_smf.config.job import JobConfig
from titan_smf.torchtitan_api import IGNORE_INDEX


def build_loss(job_config: JobConfig, **_: Any) -> Any:
    """Return the loss function, compiled if `[compile]` says so."""
    if job_config.compile.enable and "loss" in job_config.compile.components:
        return torch.compile(summed_cross_entropy, backend=job_config.compile.backend)
    return summed_cross_entropy


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropy, in nats, over target tokens, in float32 or `logits`' wider dtype.

    Args:
        logits: (B, S, vocabulary).
        labels: (B, S) token ids; IGNORE_INDEX where there is no target.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, 1).to(wide),
        labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
    )
