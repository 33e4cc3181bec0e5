"""Training on several ranks is plain AdamW on the whole model, and counts every access once."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.launch import run_on_ranks
from tests.training.test_training import EXACT, HSDP, SHORT, TECHNIQUES, arguments, metrics, train

RATES = {
    "optimizer.lr": 3e-3,
    "optimizer.weight_decay": 0.2,
    "memory.value_lr": 0.05,
    "memory.value_weight_decay": 0.3,
    "training.max_norm": 0.1,
    "lr_scheduler.decay_ratio": 0.0,
    "memory.layers": "[1, 2]",
}


def plain_adamw(folder: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop without any of the trainer's parts."""
    from titan_smf.config.job import load_config
    from titan_smf.data.loader import TokenLoader, WeightedShards
    from titan_smf.data.sources import open_source
    from titan_smf.data.tokenizer import load_tokenizer
    from titan_smf.model.llama import MemoryLlama
    from titan_smf.training.train_spec import model_args

    config = load_config(arguments(folder, SHORT | EXACT | RATES))
    tokenizer = load_tokenizer("bytes")
    torch.set_default_dtype(torch.float64)
    try:
        model = MemoryLlama(model_args(config, tokenizer))
    finally:
        torch.set_default_dtype(torch.float32)
    model.init_weights()
    values = list(model.tables.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("tables")]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": 3e-3, "weight_decay": 0.2},
        {"params": values, "lr": 0.05, "weight_decay": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 2))
    path = config.data.sources[0].path
    shards = WeightedShards(path, open_source(path, tokenizer))
    batches = iter(TokenLoader([shards], config.training.seq_len, 8, 0, 1, seed=0))
    losses, norms = [], []
    for _ in range(config.training.steps):
        inputs, labels = next(batches)
        logits, _ = model(inputs["input"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(("ranks", "placement"), [(2, {}), (4, HSDP)])
def test_training_is_plain_adamw(ranks: int, placement: dict[str, Any], tmp_path: Path) -> None:
    losses, norms = plain_adamw(tmp_path / "plain")
    assert min(norms) > 0.2, "clipping matters"
    runs = {"ours": SHORT | EXACT | RATES | placement}
    run_on_ranks(train, ranks, str(tmp_path), runs)
    assert metrics(tmp_path / "ours") == pytest.approx(losses, rel=0, abs=1e-10)
    assert metrics(tmp_path / "ours", "grad_norm") == pytest.approx(norms, rel=0, abs=1e-10)


def count_accesses(rank: int, ranks: int, folder: str) -> list[int]:
    """Accesses that all ranks counted in each step."""
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    totals: list[int] = []

    class Counting(Trainer):
        def _usage(self) -> dict[str, float]:
            counted = torch.stack([counter.counts.sum() for counter in self.accesses]).sum()
            dist.all_reduce(counted)
            totals.append(int(counted))
            return super()._usage()

    for technique in ("plain", "full checkpointing", "every operator"):
        settings = SHORT | HSDP | TECHNIQUES[technique] | {"memory.layers": "[1, 2]"}
        trainer = Counting(load_config(arguments(Path(folder) / technique, settings)))
        trainer.train()
        trainer.close()
    return totals


def test_every_access_is_counted_once(tmp_path: Path) -> None:
    tokens, heads, k, layers, steps = 8 * 128, 4, 8, 2, 4
    for totals in run_on_ranks(count_accesses, 4, str(tmp_path)):
        assert totals == [tokens * heads * k * layers] * steps * 3
