"""The loss on held-out text during training."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from titan_smf.data.loader import Batch
from titan_smf.model.llama import MemoryLlama
from titan_smf.model.parallelize import reshard
from titan_smf.runtime import on_any_rank
from titan_smf.torchtitan_api import IGNORE_INDEX

_BATCHES_BETWEEN_STOP_CHECKS = 16


@torch.no_grad()
def mean_loss(
    model: MemoryLlama,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    stop: Callable[[], bool],
    device: torch.device,
) -> float | None:
    """Return the mean loss a token of batches on all ranks. Collective.

    Args:
        batches: as many on every rank.
        loss_of: the loss of a batch, summed over target tokens.
        stop: whether this process was asked to stop.

    Returns:
        None if any rank was asked to stop.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, start=1):
        loss = loss_of(batch)
        sums[:2] += torch.stack([loss, (batch[1] != IGNORE_INDEX).sum().to(loss)]).double()
        if number % _BATCHES_BETWEEN_STOP_CHECKS == 0 and on_any_rank(stop(), device):
            break
    sums[2] = stop()
    dist.all_reduce(sums)
    reshard(model)  # without a backward pass the last parameters stay gathered
    model.train()
    total, targets, stops = sums.tolist()
    return None if stops else total / targets
