"""Full finetuning, LoRA, replay: the same on every placement; LoRA changes its adapters alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.support.launch import run_on_ranks
from tests.support.training_runs import (
    DENSE,
    EXACT,
    FULL_FT,
    HSDP,
    LORA_FT,
    SPARSE_FT,
    Settings,
    build,
    metrics,
    selections,
    train,
    weights,
)
from titan_smf.checkpoint.merge_adapters import merge_adapters
from titan_smf.checkpoint.peft_format import ADAPTER_FILE, CONFIG_FILE
from titan_smf.errors import CheckpointError

SHORT: Settings = EXACT | {
    "training.steps": 4,
    "training.seq_len": 96,
    "checkpoint.interval": 2,
    "stream.path": "synthetic:world?facts=300&new_facts=2",
    "stream.epochs": 2,
    "metrics.enable_tensorboard": "false",
}
REPLAY: Settings = {
    "replay.share": 0.25,
    "replay.sources": '[{path = "synthetic:world?facts=300&new_facts=2"}]',
}
BASES: dict[str, Settings] = {"base": FULL_FT, "dense base": FULL_FT | DENSE}
RUNS: dict[str, Settings] = {
    "full": FULL_FT,
    "full dense": FULL_FT | DENSE,
    "values": FULL_FT | {"finetune.method": "values"},
    "lora": LORA_FT | REPLAY,
    "lora two maps": LORA_FT | {"lora.targets": "wv,w2", "activation_checkpoint.mode": "full"},
    "lora attention dense": LORA_FT | DENSE | {"lora.targets": "attention"},
    "sparse replay": SPARSE_FT | REPLAY | {"lr_scheduler.decay_ratio": 0.0},
}
RUNS_OF_TEXTS = ("sparse replay", "sparse texts")  # with and without replay between the texts
RESUMED = ("full", "lora", "sparse replay")
TOKENS = torch.arange(2 * 40).view(2, 40) % 250


def settings_of(name: str, bases: Path) -> Settings:
    base = bases / ("dense base" if "dense" in name else "base")
    return SHORT | RUNS[name] | {"checkpoint.initial_load_path": str(base)}


@torch.no_grad()
def logits(trainer: Any) -> torch.Tensor:
    return trainer.model(TOKENS)[0]


def learn_and_merge(
    rank: int, ranks: int, folder: str, bases: str, more: Settings, others: dict[str, Settings]
) -> dict[str, list[torch.Tensor]]:
    """All runs, and others; of those with LoRA the logits before, after, of base and merged."""
    train(rank, ranks, folder, others)
    found = {}
    for name in RUNS:
        run, settings = Path(folder) / name, settings_of(name, Path(bases)) | more
        if not name.startswith("lora"):
            train(rank, ranks, folder, {name: settings})
            continue
        trainer = build(run, settings)
        trainer.restore()
        found[name] = [logits(trainer)]
        trainer.train()
        found[name].append(logits(trainer))
        trainer.close()
        base, merged = Path(settings["checkpoint.initial_load_path"]), run / "merged by 0"
        # Reading a checkpoint is collective: every rank merges, only the first one's result stays.
        merge_adapters(base, run, run / f"merged by {rank}", report=print)
        dist.barrier()
        for start in (base, merged):
            model = {key: value for key, value in settings.items() if not key.startswith("lora.")}
            model |= FULL_FT | {"checkpoint.initial_load_path": str(start)}
            trainer = build(run / f"from {start.name}", model)
            trainer.restore()
            found[name].append(logits(trainer))
            trainer.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Every run on 1, 2 and 4 ranks and on HSDP 2x2, in float64, from bases made on 2 ranks.

    Some are begun on HSDP a second time, and go on on 2 ranks.
    """
    folder = tmp_path_factory.mktemp("runs")
    bases = {name: SHORT | base | {"optimizer.lr": 0.01} for name, base in BASES.items()}
    run_on_ranks(train, 2, str(folder), bases)
    found = {}
    for placement, ranks, more in (("2x2", 4, HSDP), ("4", 4, {}), ("1", 1, {}), ("2", 2, {})):
        resumed = {f"../resumed/{name}": settings_of(name, folder) | more for name in RESUMED}
        texts = settings_of("sparse replay", folder)
        texts |= {"replay.share": 0.0, "training.global_batch_size": 6}
        others = {
            "2x2": {name: run | {"training.steps": 2} for name, run in resumed.items()},
            "4": {},
            "1": {"sparse texts": texts},
            "2": resumed,
        }[placement]
        arguments = str(folder / placement), str(folder), more, others
        found[placement] = run_on_ranks(learn_and_merge, ranks, *arguments, timeout=400)
    return folder, found


@pytest.fixture
def folder(runs: tuple[Path, dict[str, Any]]) -> Path:
    return runs[0]


@pytest.mark.parametrize("placement", ["2", "4", "2x2"])
def test_losses_do_not_depend_on_the_placement(folder: Path, placement: str) -> None:
    for name in RUNS:
        for metric in ("loss", "grad_norm"):
            one = metrics(folder / "1" / name, metric)
            assert len(one) == 4
            several = metrics(folder / placement / name, metric)
            assert several == pytest.approx(one, rel=0, abs=1e-10), name
    here, alone = (selections(folder / place / "sparse replay") for place in (placement, "1"))
    assert here == alone


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_other_ranks_it_ends_as_if_never_stopped(folder: Path, name: str) -> None:
    for metric in ("loss", "grad_norm"):
        straight = metrics(folder / "1" / name, metric)
        resumed = metrics(folder / "resumed" / name, metric)
        assert resumed == pytest.approx(straight, rel=0, abs=1e-10)


def test_replayed_tokens_do_not_count_for_the_selection(folder: Path) -> None:
    with_replay, texts = (selections(folder / "1" / name) for name in RUNS_OF_TEXTS)
    assert with_replay[0] == texts[0]
    losses, of_texts = (metrics(folder / "1" / name) for name in RUNS_OF_TEXTS)
    assert abs(losses[0] - of_texts[0]) > 1e-3, "replayed tokens are learned all the same"


def test_lora_starts_as_its_base_and_merged_it_is_what_it_was(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    for placement, ranks in runs[1].items():
        for name, (before, after, base, merged) in ranks[0].items():
            assert torch.equal(before, base), (placement, name)
            assert (after - base).abs().max() > 1e-3, (placement, name)
            assert (merged - after).abs().max() < 1e-12, (placement, name)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("lora")])
def test_lora_changes_nothing_but_adapters(folder: Path, name: str) -> None:
    early, late = weights(folder / "1" / name, 2), weights(folder / "1" / name, 4)
    adapters = {key for key in late if ".lora_" in key}
    assert not [key for key in late if torch.equal(early[key], late[key]) == (key in adapters)]


def test_values_alone_change_where_they_alone_learn(folder: Path) -> None:
    early, late = weights(folder / "1" / "values", 2), weights(folder / "1" / "values", 4)
    changed = {key for key in late if not torch.equal(early[key], late[key])}
    assert changed == {"model.tables.0.values"}


def test_adapters_that_do_not_fit_are_not_merged(folder: Path, tmp_path: Path) -> None:
    base, run, output = folder / "base", folder / "1" / "lora", tmp_path / "merged"
    tensors, config = load_file(run / ADAPTER_FILE), json.loads((run / CONFIG_FILE).read_text())
    beyond = {name.replace("layers.0", "layers.9"): tensor for name, tensor in tensors.items()}
    alone = {name: tensor for name, tensor in tensors.items() if not name.endswith("B.weight")}
    for number, (found, settings, message) in enumerate(
        [
            (beyond, config, "layers.9.* does not fit the weights in .*base"),
            (alone, config, "is no adapter of a map of this Llama"),
            (tensors | {"lm_head.weight": torch.zeros(1)}, config, "lm_head.weight is no part"),
            (tensors, config | {"use_rslora": True}, "adapters with use_rslora are not supported"),
            (tensors, {}, "the adapters cannot be read"),
        ]
    ):
        adapters = tmp_path / str(number)
        adapters.mkdir()
        save_file(found, adapters / ADAPTER_FILE)
        (adapters / CONFIG_FILE).write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=message):
            merge_adapters(base, adapters, output, report=print)
    with pytest.raises(CheckpointError, match="has adapters itself"):
        merge_adapters(run, run, output, report=print)
    with pytest.raises(CheckpointError, match="no adapters there"):
        merge_adapters(base, folder / "1" / "full", output, report=print)
    with pytest.raises(CheckpointError, match="trained on other weights: their fingerprint is"):
        merge_adapters(run / "merged by 0", run, output, report=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4"]
    merge_adapters(base, run, output, report=print)
    with pytest.raises(CheckpointError, match="exists; give the name of a new folder"):
        merge_adapters(base, run, output, report=print)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FULL_FT, 'has adapters; set finetune.method = "lora"'),
        (LORA_FT | {"lora.alpha": 3.0}, "alpha was 16.0 there and is 3.0 here"),
    ],
)
def test_weights_with_adapters_start_a_run_with_the_same_adapters(
    folder: Path, tmp_path: Path, settings: Settings, message: str
) -> None:
    start = {"checkpoint.initial_load_path": str(folder / "1" / "lora")}
    with pytest.raises(RuntimeError, match=message):
        run_on_ranks(train, 1, str(tmp_path), {"run": SHORT | settings | start})
