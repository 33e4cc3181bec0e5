"""Generation: the key-value cache against reading everything again for each token."""

import statistics
import tempfile
import time
from typing import Any

from titan_smf.bench.measure import Measure, on_ranks
from titan_smf.bench.training import ROOT

PROMPTS = 64
NEW_TOKENS = 16
BATCH_SIZE = 32
LENGTHS = {"short prompts": (16, 48), "long prompts": (200, 400)}


def generation(runs: int) -> list[Measure]:
    """Answers of one length to prompts of many, on one process and on two ranks."""
    measures = []
    for ranks in (1, 2):
        times = on_ranks(_times, ranks, runs)[0]
        where = f"{ranks} ranks" if ranks > 1 else "one process"
        for prompts, (shortest, longest) in LENGTHS.items():
            plain, cached = times[f"{prompts}, uncached"], times[f"{prompts}, cached"]
            speed = PROMPTS * NEW_TOKENS / cached
            measures.append(
                Measure(
                    f"generation: uncached / cached, {prompts}, {where}",
                    plain / cached,
                    note=f"demo sizes, {shortest} to {longest} tokens: {speed:,.0f} new tokens/s",
                )
            )
    return measures


def _times(rank: int, runs: int) -> dict[str, float]:
    """Median seconds of both ways, which run in turns."""
    import torch

    from titan_smf.config.job import load_config
    from titan_smf.evaluation.generate import generate
    from titan_smf.training.trainer import Trainer

    generator = torch.Generator().manual_seed(0)
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--job.config", str(ROOT / "train_configs/debug_pretrain.toml")]
        words += ["--job.dump_folder", folder, "--model.flavor", "demo"]
        words += ["--checkpoint.enable", "false", "--evaluation.seq_len", "512"]
        trainer = Trainer(load_config(words))
        trainer.restore()
        model = trainer.evaluation.model
        for name, (shortest, longest) in LENGTHS.items():
            lengths = torch.randint(shortest, longest, (PROMPTS,), generator=generator).tolist()
            prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]
            seconds: dict[str, list[float]] = {"uncached": [], "cached": []}
            for _ in range(-(-runs // 3)):
                begin = time.perf_counter()
                _uncached(model, prompts)
                middle = time.perf_counter()
                with model.open():
                    generate(model, prompts, [], NEW_TOKENS, BATCH_SIZE)
                seconds["uncached"].append(middle - begin)
                seconds["cached"].append(time.perf_counter() - middle)
            times |= {f"{name}, {way}": statistics.median(each) for way, each in seconds.items()}
        trainer.close()
    return times


def _uncached(model: Any, prompts: list[list[int]]) -> None:
    """The plain loop: batches of like length, every token of a batch read again for the next."""
    import torch
    import torch.distributed as dist

    order = sorted(prompts, key=len)[dist.get_rank() :: dist.get_world_size()]
    with torch.no_grad():
        for first in range(0, len(order), BATCH_SIZE):
            rows = [list(prompt) for prompt in order[first : first + BATCH_SIZE]]
            for _ in range(NEW_TOKENS):
                logits = model.logits(model.padded(rows))
                for row, tokens in enumerate(rows):
                    tokens.append(int(logits[row, len(tokens) - 1].argmax()))
