"""Pretraining gives the same losses for every placement and number of ranks."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_on_ranks

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "train_configs/debug_pretrain.toml"
EXACT = {
    "training.dtype": "float64",
    "training.mixed_precision_param": "float64",
    "training.mixed_precision_reduce": "float64",
    "memory.value_dtype": "float64",
}
SHORT = {
    "training.steps": 4,
    "lr_scheduler.warmup_steps": 2,
    "checkpoint.enable": "false",
    "validation.freq": 2,
    "metrics.enable_tensorboard": "false",
}
HSDP = {"parallelism.data_parallel_replicate_degree": 2}


def arguments(folder: Path, settings: dict[str, Any], config: Path = CONFIG) -> list[str]:
    words = ["--job.config", str(config), "--job.dump_folder", str(folder)]
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    return words


def train(rank: int, ranks: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """Run several trainings one after another in one process group."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    for name, settings in runs.items():
        config = load_config(arguments(Path(folder) / name, settings))
        check(config, ranks)
        trainer = Trainer(config)
        trainer.train()
        trainer.close()


def metrics(folder: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


# A global batch of 12 sequences: three ranks, and tables whose rows they cannot share evenly.
ODD = {"training.global_batch_size": 12, "memory.n_keys": 37}

MODELS: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "shared_table": {"memory.layers": "[1, 2]"},
    "table_each": {"memory.layers": "[1, 2]", "memory.share_values": "false"},
    "plain_keys": {"memory.qk_norm": "false", "memory.heads": 1, "memory.n_keys": 37},
    "dense": {"memory.layers": "[]"},
}


@pytest.fixture(scope="module")
def exact_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model on 1, 2 and 4 ranks and on HSDP 2x2, in float64."""
    folder = tmp_path_factory.mktemp("exact")
    models = {name: SHORT | EXACT | settings for name, settings in MODELS.items()}
    odd = {"odd": SHORT | EXACT | ODD}
    run_on_ranks(train, 1, str(folder / "1"), models | odd, timeout=300)
    run_on_ranks(train, 2, str(folder / "2"), models, timeout=300)
    run_on_ranks(train, 3, str(folder / "3"), odd, timeout=300)
    on_four = {f"4/{name}": settings for name, settings in models.items()}
    on_four |= {f"2x2/{name}": settings | HSDP for name, settings in models.items()}
    run_on_ranks(train, 4, str(folder), on_four, timeout=600)
    return folder


@pytest.mark.parametrize(
    ("placement", "model"),
    [*product(("2", "4", "2x2"), MODELS), ("3", "odd")],
)
def test_losses_and_gradient_norms_do_not_depend_on_the_placement(
    exact_runs: Path, placement: str, model: str
) -> None:
    for name in ("loss", "grad_norm", "evaluation/validation/loss"):
        one = metrics(exact_runs / "1" / model, name)
        several = metrics(exact_runs / placement / model, name)
        assert len(one) == (2 if name.startswith("evaluation") else 4)
        assert several == pytest.approx(one, rel=0, abs=1e-10)


def test_slot_usage_does_not_depend_on_the_placement(exact_runs: Path) -> None:
    for model in MODELS.keys() - {"dense"}:
        one = metrics(exact_runs / "1" / model, "memory/slots_used_fraction")
        assert 0 < one[0] <= 1
        for placement in ("2", "4", "2x2"):
            folder = exact_runs / placement / model
            assert metrics(folder, "memory/slots_used_fraction") == one
            kl = metrics(exact_runs / "1" / model, "memory/usage_kl")
            assert metrics(folder, "memory/usage_kl") == pytest.approx(kl, abs=1e-12)


TECHNIQUES: dict[str, dict[str, Any]] = {
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


@pytest.fixture(scope="module")
def techniques(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every technique on one process and on 2 ranks, in float32."""
    folder = tmp_path_factory.mktemp("techniques")
    for ranks in (1, 2):
        runs = {name: SHORT | settings for name, settings in TECHNIQUES.items()}
        run_on_ranks(train, ranks, str(folder / f"{ranks}"), runs, timeout=300)
    return folder


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_techniques_give_the_losses_of_the_plain_run(techniques: Path, ranks: str) -> None:
    plain = metrics(techniques / ranks / "plain")
    for name in TECHNIQUES:
        rounding = 0.02 if name.startswith("bfloat16") else 1e-6
        assert metrics(techniques / ranks / name) == pytest.approx(plain, abs=rounding), name


def test_float32_losses_depend_on_the_placement_only_by_rounding(techniques: Path) -> None:
    one = metrics(techniques / "1" / "plain")
    assert metrics(techniques / "2" / "plain") == pytest.approx(one, rel=0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_compiled_gives_the_losses_of_the_plain_run(ranks: int, tmp_path: Path) -> None:
    placement = HSDP if ranks == 4 else {}
    runs = {name: SHORT | placement | settings for name, settings in COMPILED.items()}
    run_on_ranks(train, ranks, str(tmp_path), {"plain": SHORT | placement} | runs, timeout=600)
    for name in COMPILED:
        assert metrics(tmp_path / name) == pytest.approx(metrics(tmp_path / "plain"), abs=1e-4)
