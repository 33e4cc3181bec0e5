"""The training loss, and its mean over held-out text."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from titan_smf.config.job import JobConfig
from titan_smf.data.loader import Batch
from titan_smf.model.llama import MemoryLlama
from titan_smf.model.parallelize import reshard
from titan_smf.runtime import StopRequest, on_any_rank
from titan_smf.torchtitan_api import IGNORE_INDEX

_BATCHES_BETWEEN_STOP_CHECKS = 16


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


@torch.no_grad()
def mean_loss(
    model: MemoryLlama,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    stop: StopRequest,
    device: torch.device,
) -> float | None:
    """Return the mean loss a token of batches on all ranks; None if any was asked to stop.

    Collective; `batches` are as many on every rank. `loss_of` sums a batch's over target tokens.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, start=1):
        loss = loss_of(batch)
        sums[:2] += torch.stack([loss, (batch[1] != IGNORE_INDEX).sum().to(loss)]).double()
        if number % _BATCHES_BETWEEN_STOP_CHECKS == 0 and on_any_rank(stop.requested, device):
            break
    sums[2] = stop.requested
    dist.all_reduce(sums)
    reshard(model)  # without a backward pass the last parameters stay gathered
    model.train()
    total, targets, stops = sums.tolist()
    return None if stops else total / targets
