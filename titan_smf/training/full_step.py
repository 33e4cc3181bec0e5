"""A step of plain training: a gradient of all weights that can learn, one optimizer step.

1. per micro-batch: forward, backward; count the slots that it uses
2. sum the gradients of value tables over replicas (FSDP reduces those of the other weights)
3. clip by the global norm, let the optimizer update the weights
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_smf.model.args import num_trainable
from titan_smf.model.llama import MemoryLlama
from titan_smf.sparse.accesses import count_accesses, slots_used_fraction, usage_kl
from titan_smf.torchtitan_api import OptimizersContainer, dist_utils


class MicroBatch(NamedTuple):
    """The sequences of one forward pass of this rank, on the device."""

    tokens: Tensor
    """(B, S)."""
    labels: Tensor
    """(B, S)."""
    new: Tensor
    """(B, S) bool, the tokens to be learned: neither padding nor replayed background."""
    masks: dict[str, Any]
    """Keyword arguments of the forward pass."""


class FullStep:
    """Learns one global batch after another.

    Args:
        model: on its device.
        optimizers: of its parameters that require a gradient.
        max_norm: of the gradient.
        forward: returns a micro-batch's loss, summed over target tokens, and accesses.
    """

    def __init__(
        self,
        model: MemoryLlama,
        optimizers: OptimizersContainer,
        max_norm: float,
        forward: Callable[[MicroBatch], tuple[Tensor, list[Tensor]]],
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.max_norm = max_norm
        self.forward = forward
        self.tables = list(model.value_tables())

    def step(
        self, batches: Sequence[MicroBatch], global_targets: int, logged: bool
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Learn one global batch, of which `batches` are this rank's micro-batches.

        Returns:
            this rank's part of the loss, the gradient's norm, and, in a logged step, metrics.
        """
        losses = []
        local = [table.local_values() for table in self.tables if logged]
        counts = [torch.zeros(len(rows), dtype=torch.int64, device=rows.device) for rows in local]
        for batch in batches:
            loss, accesses = self.forward(batch)
            loss = loss / global_targets
            loss.backward()
            losses.append(loss.detach())
            if logged:
                for layer, rows in enumerate(accesses):
                    count_accesses(rows, counts[layer % len(counts)])
        for table in self.tables:
            table.reduce_replica_gradients()
        grad_norm = dist_utils.clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=True)
        self.optimizers.step()
        metrics = {}
        if logged:
            metrics = {"numbers_updated": float(num_trainable(self.model))} | self.usage(counts)
        return torch.stack(losses).sum(), grad_norm, metrics

    def usage(self, counts: Sequence[Tensor]) -> dict[str, float]:
        """Return how the counted accesses to each table use the slots of all. Collective."""
        if not self.tables:
            return {}
        groups = self.tables[0].group, self.tables[0].replicate_group
        of_all = torch.cat(list(counts))
        return {
            "memory/slots_used_fraction": slots_used_fraction(of_all, *groups),
            "memory/usage_kl": usage_kl(of_all, *groups),
        }
