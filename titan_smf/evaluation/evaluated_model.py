"""A model on all ranks that is evaluated on items, in batches of like length.

A lookup is collective, so the ranks work on one batch each at the same time; those without one run
a stand-in. Which items share a batch has no effect on their results but rounding.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.data.tokenizer import Tokenizer
from titan_smf.model.key_value_cache import KeyValueCache
from titan_smf.model.llama import MemoryLlama
from titan_smf.model.parallelize import gathered
from titan_smf.progress import ProgressTimer, format_duration
from titan_smf.runtime import StopRequest, from_all_ranks, on_any_rank

MOST_TOKENS = 8192
"""Tokens of a batch with padding, unless one item is longer: bounds the memory of logits."""

logger = logging.getLogger("titan_smf")

Result = TypeVar("Result")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of which every rank holds its shard, and what evaluation needs beside it."""

    model: MemoryLlama
    tokenizer: Tokenizer
    device: torch.device
    precision: AbstractContextManager[Any]
    """Autocast as in training."""
    reshard_policy: str
    """`parallelism.fsdp_reshard_after_forward`."""
    stop: StopRequest

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gather the dense part once; no gradients and no compilation inside. Collective."""
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),  # every batch has another shape
                gathered(self.model, self.reshard_policy),
            ):
                yield
        finally:
            self.model.train(was_training)

    def logits(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return (B, S, vocabulary), or (B, vocabulary) with a cache. Collective."""
        masks = {}
        if cache is None and self.model.model_args.attn_type == "flex":
            tokenizer: Any = self.tokenizer
            masks["attention_masks"] = self.model.get_attention_masks(tokens, tokenizer)
        with self.precision:
            return self.model(tokens, cache=cache, **masks)[0]

    def padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the sequences padded behind to the longest: (B, S) int64 on the device."""
        longest = max(map(len, sequences))
        pad = self.tokenizer.pad_id
        rows = [[*tokens, *[pad] * (longest - len(tokens))] for tokens in sequences]
        return torch.tensor(rows, device=self.device)

    def map_batches(
        self,
        work: Callable[[list[int]], Sequence[Result]],
        lengths: Sequence[int],
        batch_size: int,
        what: str,
    ) -> list[Result] | None:
        """Return every item's result, in order, on every rank; None if asked to stop. Collective.

        Args:
            work: returns the results of a batch of items; all ranks call it together, those
                without items left with an empty batch.
            lengths: tokens of each item.
            batch_size: items that a rank works on at once, at most.
            what: is done, for the progress lines.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        batches = batches_by_length(lengths, min(batch_size, -(-len(lengths) // ranks)))
        here: dict[int, Result] = {}
        done = 0
        timer = ProgressTimer()
        for first in range(0, len(batches), ranks):
            mine = batches[first + rank] if first + rank < len(batches) else []
            here |= zip(mine, work(mine), strict=True)
            if on_any_rank(self.stop.requested, self.device):
                return None
            done += sum(map(len, batches[first : first + ranks]))
            if timer.due():
                left = format_duration(timer.seconds_left(done, len(lengths)))
                logger.info("%s: %d/%d  left %s", what, done, len(lengths), left)
        results = {item: result for part in from_all_ranks(here) for item, result in part.items()}
        return [results[item] for item in range(len(lengths))]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return all items, the longest first, in batches within `batch_size` and `MOST_TOKENS`."""
    batches: list[list[int]] = []
    rows = 0
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        if not batches or len(batches[-1]) == rows:
            batches.append([])
            rows = max(1, min(batch_size, MOST_TOKENS // max(1, lengths[item])))
        batches[-1].append(item)
    return batches
