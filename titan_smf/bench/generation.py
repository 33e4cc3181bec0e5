"""Generation: the key-value cache against reading everything again for each token."""

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from titan_smf.bench.measure import SETTINGS, Measure, load_settings, median_seconds, on_ranks
from titan_smf.evaluation.generate import generate
from titan_smf.training.trainer import Trainer

PROMPTS = 64
NEW_TOKENS = 16
BATCH_SIZE = 32
LENGTHS = {"short prompts": (16, 48), "long prompts": (200, 400)}


def generation(runs: int) -> Iterator[Measure]:
    """Answers of one length to prompts of many, on one process and on two ranks."""
    for ranks, where in ((1, "one process"), (2, "2 ranks")):
        seconds = on_ranks(_seconds_of_both, ranks, runs)[0]
        for prompts, (shortest, longest) in LENGTHS.items():
            uncached, cached = seconds[prompts]
            speed = PROMPTS * NEW_TOKENS / cached
            yield Measure(
                f"generation: uncached / cached, {prompts}, {where}",
                uncached / cached,
                note=f"demo sizes, {shortest} to {longest} tokens: {speed:,.0f} new tokens/s",
            )


def _seconds_of_both(rank: int, runs: int) -> dict[str, list[float]]:
    """Return the median seconds without and with the cache, by the name of the prompts."""
    generator = torch.Generator().manual_seed(0)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_settings("debug_pretrain", folder, SETTINGS["generation"]))
        trainer.restore()
        model = trainer.evaluation.model
        for name, (shortest, longest) in LENGTHS.items():
            lengths = torch.randint(shortest, longest, (PROMPTS,), generator=generator).tolist()
            prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]
            both = [partial(_uncached, model, prompts), partial(_cached, model, prompts)]
            seconds[name] = median_seconds(both, -(-runs // 3), at_least=0, warm_up=0)
        trainer.close()
    return seconds


def _cached(model: Any, prompts: list[list[int]]) -> None:
    with model.open():
        generate(model, prompts, [], NEW_TOKENS, BATCH_SIZE)


def _uncached(model: Any, prompts: list[list[int]]) -> None:
    """Generate by the plain loop: batches of like length, each token reads all before it again."""
    order = sorted(prompts, key=len)[dist.get_rank() :: dist.get_world_size()]
    with torch.no_grad():
        for first in range(0, len(order), BATCH_SIZE):
            rows = [list(prompt) for prompt in order[first : first + BATCH_SIZE]]
            for _ in range(NEW_TOKENS):
                logits = model.logits(model.padded(rows))
                for row, tokens in enumerate(rows):
                    tokens.append(int(logits[row, len(tokens) - 1].argmax()))
