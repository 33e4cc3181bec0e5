"""Sparse finetuning changes the selected rows and nothing else, the same on every placement."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_on_ranks
from safetensors.torch import load_file
from test_training import EXACT, HSDP, ROOT, arguments, metrics, train

CONFIG = ROOT / "train_configs/debug_sparse_ft.toml"
IDF_CONFIG = ROOT / "train_configs/debug_idf.toml"
SHORT: dict[str, Any] = {
    "training.steps": 6,
    "checkpoint.interval": 3,
    "stream.path": "synthetic:world?facts=300&new_facts=4",
    "stream.epochs": 2,
    "metrics.enable_tensorboard": "false",
    "selection.verify": "true",
    "selection.top_t": 40,
}
TABLE_EACH = {"memory.layers": "[1, 2]", "memory.share_values": "false"}
RUNS: dict[str, dict[str, Any]] = {
    "tf": {},
    "tfidf": {"selection.ranking": "tfidf"},
    "kl": {"selection.ranking": "kl"},
    "random": {"selection.ranking": "random"},
    "all": {"selection.ranking": "all"},
    "more than there are": {"selection.top_t": 100_000},
    "sgd": {"optimizer.name": "SGD", "memory.value_lr": 20.0, "selection.ranking": "tfidf"},
    "decay": {"memory.value_weight_decay": 0.5},
    "shared table": {"memory.layers": "[1, 2]"},
    "table each": TABLE_EACH,
    "checkpointed": {"activation_checkpoint.mode": "full"},
}
ON_ONE_RANK: dict[str, dict[str, Any]] = {  # where the others accumulate four micro-batches
    "one micro-batch": {"training.global_batch_size": 8, "training.local_batch_size": 8},
    "padded": {"training.seq_len": 192},
    "padded more": {"training.seq_len": 256},
}


def learn(rank: int, ranks: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """Sparse runs one after another, with the counts that they need."""
    from titan_smf.config import check, load_config
    from titan_smf.trainer import Trainer

    for name, settings in runs.items():
        words = arguments(Path(folder) / name, settings, CONFIG)
        config = load_config(words)
        check(config, ranks)
        trainer = Trainer(config)
        trainer.train()
        trainer.close()


def count(rank: int, ranks: int, folder: str, settings: dict[str, Any]) -> bool:
    """A count of the background."""
    from titan_smf.config import check, load_config
    from titan_smf.count_background import count_background, counting_config
    from titan_smf.trainer import Trainer

    config = counting_config(load_config(arguments(Path(folder), settings, IDF_CONFIG)), ranks)
    check(config, ranks)
    trainer = Trainer(config)
    done = count_background(trainer)
    trainer.close()
    return done


@pytest.fixture(scope="module")
def idf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts for the debug model's random weights, in float64."""
    folder = tmp_path_factory.mktemp("idf")
    run_on_ranks(count, 2, str(folder), EXACT | {"idf.num_batches": 5})
    return folder / "idf.safetensors"


@pytest.fixture(scope="module")
def runs(idf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run on 1, 2 and 4 ranks and on HSDP 2x2, in float64."""
    folder = tmp_path_factory.mktemp("runs")
    counted = SHORT | EXACT | {"selection.idf_path": str(idf)}
    all_runs = {name: counted | settings for name, settings in RUNS.items()}
    alone = {name: counted | settings for name, settings in ON_ONE_RANK.items()}
    run_on_ranks(learn, 1, str(folder / "1"), all_runs | alone, timeout=300)
    for ranks in (2, 4):
        run_on_ranks(learn, ranks, str(folder / f"{ranks}"), all_runs, timeout=300)
    hsdp = {name: settings | HSDP for name, settings in all_runs.items()}
    run_on_ranks(learn, 4, str(folder / "2x2"), hsdp, timeout=300)
    return folder


def selections(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "selections.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint of one rank."""
    (file,) = (folder / f"checkpoints/step-{step}").glob("*.safetensors")
    return {name: t for name, t in load_file(file).items() if name.startswith("model.")}


@pytest.mark.parametrize("placement", ["2", "4", "2x2"])
def test_selections_and_losses_do_not_depend_on_the_placement(runs: Path, placement: str) -> None:
    for name in RUNS:
        one, several = runs / "1" / name, runs / placement / name
        assert selections(several) == selections(one), name
        losses = metrics(one)
        assert len(losses) == 6
        assert metrics(several) == pytest.approx(losses, rel=0, abs=1e-10), name
        norms = metrics(one, "grad_norm")
        assert metrics(several, "grad_norm") == pytest.approx(norms, rel=0, abs=1e-10), name


def test_gradient_accumulation_does_not_change_the_selection(runs: Path) -> None:
    assert selections(runs / "1/one micro-batch") == selections(runs / "1/tf")
    losses = metrics(runs / "1/tf")
    assert metrics(runs / "1/one micro-batch") == pytest.approx(losses, rel=0, abs=1e-10)


def test_padding_does_not_change_the_selection(runs: Path) -> None:
    assert selections(runs / "1/padded more") == selections(runs / "1/padded")
    losses = metrics(runs / "1/padded")
    assert metrics(runs / "1/padded more") == pytest.approx(losses, rel=0, abs=1e-10)


@pytest.mark.parametrize("name", ["tfidf", "sgd", "decay", "shared table", "table each", "all"])
def test_only_selected_rows_change(runs: Path, name: str) -> None:
    early, late = weights(runs / "1" / name, 3), weights(runs / "1" / name, 6)
    slots = {slot for line in selections(runs / "1" / name)[3:] for slot in line["slots"]}
    for key, tensor in late.items():
        if not key.startswith("model.tables."):
            assert torch.equal(tensor, early[key]), key
            continue
        table = int(key.split(".")[2])
        selected = [slot - table * 9216 for slot in slots if slot // 9216 == table]
        changed = (tensor != early[key]).any(1)
        assert changed[selected].all(), "every selected row has learned"
        changed[selected] = False
        assert not changed.any(), "no other row has changed"


def test_it_learns_what_it_is_given(tmp_path: Path) -> None:
    pretraining = {"training.steps": 60, "metrics.enable_tensorboard": "false"}
    run_on_ranks(train, 2, str(tmp_path), {"base": pretraining})
    one_fact = SHORT | {
        "stream.path": "synthetic:world?facts=300&new_facts=1",
        "stream.epochs": 12,
        "training.steps": 12,
        "training.global_batch_size": 8,
        "lr_scheduler.decay_ratio": 0.0,
        "memory.value_lr": 0.2,
        "selection.top_t": 400,
        "checkpoint.initial_load_path": tmp_path / "base",
    }
    run_on_ranks(learn, 2, str(tmp_path), {"run": one_fact})
    losses = metrics(tmp_path / "run")
    assert losses[0] < metrics(tmp_path / "base")[0] - 1, "it starts from the base"
    assert losses[-1] < losses[0] - 0.15


def test_resumed_on_other_ranks_it_ends_as_if_never_stopped(runs: Path, tmp_path: Path) -> None:
    settings = SHORT | EXACT | RUNS["decay"]
    run_on_ranks(learn, 4, str(tmp_path), {"run": settings | HSDP | {"training.steps": 3}})
    run_on_ranks(learn, 2, str(tmp_path), {"run": settings})
    straight = runs / "1/decay"
    assert selections(tmp_path / "run") == selections(straight)
    # The schedule of the first three steps ends earlier than that of six.
    assert len(metrics(tmp_path / "run")) == 6


def count_in_two_goes(rank: int, ranks: int, folder: str) -> None:
    settings = EXACT | {"idf.num_batches": 5, "idf.checkpoint_interval": 2}
    count(rank, ranks, folder, settings | {"idf.num_batches": 3})
    if rank == 0:
        path = Path(folder) / "idf.safetensors"
        path.rename(path.with_name(path.name + ".partial"))
    torch.distributed.barrier()
    count(rank, ranks, folder, settings)


@pytest.mark.parametrize("ranks", [1, 4])
def test_counts_do_not_depend_on_ranks_or_interruptions(
    idf: Path, ranks: int, tmp_path: Path
) -> None:
    run_on_ranks(count_in_two_goes, ranks, str(tmp_path))
    assert (tmp_path / "idf.safetensors").read_bytes() == idf.read_bytes()
    assert (tmp_path / "document_frequency.png").stat().st_size > 10_000
