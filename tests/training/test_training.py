"""Pretraining gives the same losses for every placement, and those of plain AdamW; it counts every
access once."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.launch import run_on_ranks
from tests.support.training_runs import (
    DENSE,
    EXACT,
    HSDP,
    SHARED_TABLE,
    SHORT,
    TABLE_EACH,
    Settings,
    arguments,
    build,
    metrics,
    train,
)

Runs = tuple[Path, list[dict[str, list[int]]]]

# A global batch of 12 sequences: three ranks, and tables whose rows they cannot share evenly.
ODD = {"training.global_batch_size": 12, "memory.n_keys": 37}

MODELS: dict[str, Settings] = {
    "one_layer": {},
    "shared_table": SHARED_TABLE,
    "table_each": TABLE_EACH,
    "plain_keys": {"memory.qk_norm": "false", "memory.heads": 1, "memory.n_keys": 37},
    "dense": DENSE,
}


TECHNIQUES: dict[str, Settings] = {
    "plain": {},
    "full checkpointing": {"activation_checkpoint.mode": "full"},
    "every layer": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "1",
    },
    "every operator": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
    },
    "bfloat16": {"training.mixed_precision_param": "bfloat16"},
    "bfloat16 values": {
        "training.mixed_precision_param": "bfloat16",
        "memory.value_dtype": "bfloat16",
    },
}
COMPILED = {
    "compiled": {"compile.enable": "true"},
    "compiled and checkpointed": TECHNIQUES["every operator"] | {"compile.enable": "true"},
}


RATES: Settings = SHARED_TABLE | {
    "optimizer.lr": 3e-3,
    "optimizer.weight_decay": 0.2,
    "memory.value_lr": 0.05,
    "memory.value_weight_decay": 0.3,
    "training.max_norm": 0.1,
    "lr_scheduler.decay_ratio": 0.0,
}


def train_and_count(
    rank: int, ranks: int, folder: str, runs: dict[str, Settings], counted: dict[str, Settings]
) -> dict[str, list[int]]:
    """Trainings; of some the accesses that all ranks counted in each step."""
    train(rank, ranks, folder, runs)
    totals: dict[str, list[int]] = {}
    for name, settings in counted.items():
        trainer = build(Path(folder) / name, settings)
        step, totals[name] = trainer.full_step, []

        def counting(
            counts: list[torch.Tensor], usage: Any = step.usage, found: list[int] = totals[name]
        ) -> dict[str, float]:
            total = torch.cat(counts).sum()
            dist.all_reduce(total)
            found.append(int(total))
            return usage(counts)

        step.usage = counting
        trainer.train()
        trainer.close()
    return totals


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every model on 1, 2 and 4 ranks and on HSDP 2x2, in float64; every technique on one process
    and on 2 ranks, in float32; and what each rank of HSDP 2x2 counted."""
    folder = tmp_path_factory.mktemp("runs")
    models = {name: SHORT | EXACT | settings for name, settings in MODELS.items()}
    odd = {"odd": SHORT | EXACT | ODD}
    techniques = {name: SHORT | settings for name, settings in TECHNIQUES.items()}
    adamw = SHORT | EXACT | RATES
    run_on_ranks(train, 1, str(folder / "1"), models | odd | techniques, timeout=600)
    on_two = models | techniques | {"adamw": adamw}
    run_on_ranks(train, 2, str(folder / "2"), on_two, timeout=600)
    run_on_ranks(train, 3, str(folder / "3"), odd, timeout=300)
    on_four = {f"4/{name}": settings for name, settings in models.items()}
    on_four |= {f"2x2/{name}": settings | HSDP for name, settings in models.items()}
    on_four["2x2/adamw"] = adamw | HSDP
    counted = {
        name: SHORT | HSDP | SHARED_TABLE | TECHNIQUES[name]
        for name in ("plain", "full checkpointing", "every operator")
    }
    totals = run_on_ranks(train_and_count, 4, str(folder), on_four, counted, timeout=600)
    return folder, totals


@pytest.mark.parametrize(
    ("placement", "model"),
    [*product(("2", "4", "2x2"), MODELS), ("3", "odd")],
)
def test_losses_and_gradient_norms_do_not_depend_on_the_placement(
    runs: Runs, placement: str, model: str
) -> None:
    for name in ("loss", "grad_norm", "evaluation/validation/loss"):
        one = metrics(runs[0] / "1" / model, name)
        several = metrics(runs[0] / placement / model, name)
        assert len(one) == (2 if name.startswith("evaluation") else 4)
        assert several == pytest.approx(one, rel=0, abs=1e-10)


def test_slot_usage_does_not_depend_on_the_placement(runs: Runs) -> None:
    for model in MODELS.keys() - {"dense"}:
        one = metrics(runs[0] / "1" / model, "memory/slots_used_fraction")
        assert 0 < one[0] <= 1
        for placement in ("2", "4", "2x2"):
            folder = runs[0] / placement / model
            assert metrics(folder, "memory/slots_used_fraction") == one
            kl = metrics(runs[0] / "1" / model, "memory/usage_kl")
            assert metrics(folder, "memory/usage_kl") == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_techniques_give_the_losses_of_the_plain_run(runs: Runs, ranks: str) -> None:
    plain = metrics(runs[0] / ranks / "plain")
    for name in TECHNIQUES:
        rounding = 0.02 if name.startswith("bfloat16") else 1e-6
        assert metrics(runs[0] / ranks / name) == pytest.approx(plain, abs=rounding), name


def test_float32_losses_depend_on_the_placement_only_by_rounding(runs: Runs) -> None:
    one = metrics(runs[0] / "1" / "plain")
    assert metrics(runs[0] / "2" / "plain") == pytest.approx(one, rel=0, abs=1e-5)


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop without any of the trainer's parts."""
    from titan_smf.config.job import load_config
    from titan_smf.data.loader import TokenLoader, WeightedShards
    from titan_smf.data.sources import open_source
    from titan_smf.data.tokenizer import load_tokenizer
    from titan_smf.model.llama import MemoryLlama
    from titan_smf.training.train_spec import model_args

    folder = tmp_path_factory.mktemp("plain")
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


@pytest.mark.parametrize("placement", ["2", "2x2"])
def test_training_is_plain_adamw(
    runs: Runs, adamw: tuple[list[float], list[float]], placement: str
) -> None:
    losses, norms = adamw
    assert min(norms) > 0.2, "clipping matters"
    run = runs[0] / placement / "adamw"
    assert metrics(run) == pytest.approx(losses, rel=0, abs=1e-10)
    assert metrics(run, "grad_norm") == pytest.approx(norms, rel=0, abs=1e-10)


def test_every_access_is_counted_once(runs: Runs) -> None:
    tokens, heads, k, layers, steps = 8 * 128, 4, 8, 2, 4
    for totals in runs[1]:
        assert len(totals) == 3
        assert all(total == [tokens * heads * k * layers] * steps for total in totals.values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_compiled_gives_the_losses_of_the_plain_run(ranks: int, tmp_path: Path) -> None:
    placement = HSDP if ranks == 4 else {}
    runs = {name: SHORT | placement | settings for name, settings in COMPILED.items()}
    run_on_ranks(train, ranks, str(tmp_path), {"plain": SHORT | placement} | runs, timeout=600)
    for name in COMPILED:
        assert metrics(tmp_path / name) == pytest.approx(metrics(tmp_path / "plain"), abs=1e-4)
