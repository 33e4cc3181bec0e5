"""Sparse finetuning changes the selected rows and nothing else, the same on every placement."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import run_on_ranks
from tests.training.test_resume import finish, start_ranks, wait_for_step
from tests.training.test_training import EXACT, HSDP, ROOT, arguments, metrics, train
from titan_smf.checkpoint.patch import Patch, chain
from titan_smf.checkpoint.patch_checkpoints import export_patch
from titan_smf.checkpoint.patch_file import load_patch
from titan_smf.errors import ConfigError, PatchError

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
SHARED_TABLE = {"memory.layers": "[1, 2]"}
TABLE_EACH = SHARED_TABLE | {"memory.share_values": "false"}
BASES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "shared table": SHARED_TABLE,
    "table each": TABLE_EACH,
}
BASE: dict[str, Any] = EXACT | {
    "training.steps": 1,
    "lr_scheduler.warmup_steps": 0,
    "validation.enable": "false",
    "metrics.enable_tensorboard": "false",
}
DOCUMENTS = {"idf.num_batches": 12, "idf.checkpoint_interval": 1}
RUNS: dict[str, dict[str, Any]] = {
    "tf": {},
    "tfidf": {"selection.ranking": "tfidf"},
    "kl": {"selection.ranking": "kl"},
    "random": {"selection.ranking": "random"},
    "all": {"selection.ranking": "all"},
    "more than there are": {"selection.top_t": 100_000},
    "sgd": {"optimizer.name": "SGD", "memory.value_lr": 20.0, "selection.ranking": "tfidf"},
    "decay": {"memory.value_weight_decay": 0.5},
    "shared table": SHARED_TABLE,
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
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    for name, settings in runs.items():
        words = arguments(Path(folder) / name, settings, CONFIG)
        config = load_config(words)
        check(config, ranks)
        trainer = Trainer(config)
        trainer.train()
        trainer.close()


def count(rank: int, ranks: int, folder: str, settings: dict[str, Any]) -> bool:
    """A count of the background."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.count_background import count_background, counting_config
    from titan_smf.training.trainer import Trainer

    config = counting_config(load_config(arguments(Path(folder), settings, IDF_CONFIG)), ranks)
    check(config, ranks)
    trainer = Trainer(config)
    done = count_background(trainer)
    trainer.close()
    return done


def make_bases(rank: int, ranks: int, folder: str) -> None:
    """What sparse runs start from: models of each kind, and counts of the one layer's."""
    train(rank, ranks, folder, {name: BASE | settings for name, settings in BASES.items()})
    base = {"checkpoint.initial_load_path": Path(folder) / "one layer"}
    count(rank, ranks, f"{folder}/idf", EXACT | DOCUMENTS | base)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    run_on_ranks(make_bases, 2, str(folder))
    return folder


def base_of(bases: Path, name: str) -> Path:
    return bases / (name if name in BASES else "one layer")


def idf_of(bases: Path) -> Path:
    return bases / "idf/idf.safetensors"


def exact(bases: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run in float64."""
    given = {
        "selection.idf_path": idf_of(bases),
        "checkpoint.initial_load_path": base_of(bases, name),
    }
    return SHORT | EXACT | given | settings


@pytest.fixture(scope="module")
def runs(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run on 1, 2 and 4 ranks and on HSDP 2x2, in float64."""
    folder = tmp_path_factory.mktemp("runs")
    all_runs = {name: exact(bases, name, settings) for name, settings in RUNS.items()}
    alone = {name: exact(bases, name, settings) for name, settings in ON_ONE_RANK.items()}
    run_on_ranks(learn, 1, str(folder / "1"), all_runs | alone, timeout=300)
    run_on_ranks(learn, 2, str(folder / "2"), all_runs, timeout=300)
    on_four = {f"4/{name}": settings for name, settings in all_runs.items()}
    on_four |= {f"2x2/{name}": settings | HSDP for name, settings in all_runs.items()}
    run_on_ranks(learn, 4, str(folder), on_four, timeout=600)
    return folder


def selections(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "selections.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint: each rank's file holds a part of the rows."""
    parts = [
        load_file(file) for file in sorted(folder.glob(f"checkpoints/step-{step}/*.safetensors"))
    ]
    names = [name for name in parts[0] if name.startswith("model.")]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


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


def test_activation_checkpointing_does_not_change_the_selection(runs: Path) -> None:
    for placement in ("1", "2", "4", "2x2"):
        folder = runs / placement
        assert selections(folder / "checkpointed") == selections(folder / "tf")


@pytest.mark.parametrize("name", ["tfidf", "sgd", "decay", "shared table", "table each", "all"])
def test_only_selected_rows_change(runs: Path, name: str) -> None:
    only_selected_rows_changed(runs / "1" / name)


def only_selected_rows_changed(folder: Path) -> None:
    """From the third step to the sixth and last."""
    early, late = weights(folder, 3), weights(folder, 6)
    slots = {slot for line in selections(folder)[3:] for slot in line["slots"]}
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


BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
COMPILED = {"compile.enable": "true"}


def check_rounding(folder: Path, ranks: int, techniques: dict[str, dict[str, Any]]) -> None:
    """Only selected rows change, and nearly all slots are those of the plain float32 run."""
    all_runs = {"plain": SHORT} | {name: SHORT | more for name, more in techniques.items()}
    run_on_ranks(learn, ranks, str(folder), all_runs, timeout=400)
    for name in techniques:
        only_selected_rows_changed(folder / name)
        for plain, rounded in zip(
            selections(folder / "plain"), selections(folder / name), strict=True
        ):
            others = set(rounded["slots"]) - set(plain["slots"])
            assert len(others) <= 0.2 * len(plain["slots"]), name


def test_in_bfloat16_only_selected_rows_change(tmp_path: Path) -> None:
    check_rounding(tmp_path, 2, {"bfloat16": BFLOAT16})


@pytest.mark.slow
def test_compiled_only_selected_rows_change(tmp_path: Path) -> None:
    two_tables = TABLE_EACH | COMPILED | BFLOAT16
    check_rounding(tmp_path, 1, {"compiled": COMPILED, "both": COMPILED | BFLOAT16})
    run_on_ranks(learn, 2, str(tmp_path), {"two tables": SHORT | two_tables}, timeout=400)
    only_selected_rows_changed(tmp_path / "two tables")


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


def distinct_rows(folder: Path) -> list[int]:
    """After each step, by the log of selections."""
    seen: set[int] = set()
    return [len(seen := seen | set(line["slots"])) for line in selections(folder)]


def bits(patch: Patch) -> list[bytes]:
    tensors = (patch.ids, patch.old, patch.new)
    return [tensor.flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def check_own_patch(run: Path, base: Path) -> Patch:
    """The patch that a run wrote is the one that its checkpoint and the base's differ by."""
    own = load_patch(str(run / "patch.safetensors"))
    exported = export_patch(base, run, "", print)
    assert own.metadata == exported.metadata
    assert bits(own) == bits(exported)
    return own


def test_a_run_writes_the_patch_that_is_exported(runs: Path, bases: Path) -> None:
    for name in ("tfidf", "sgd", "decay", "shared table", "table each", "all"):
        patches = [
            check_own_patch(runs / placement / name, base_of(bases, name))
            for placement in ("1", "2", "4", "2x2")
        ]
        (step,) = patches[0].metadata.lineage
        assert (step.steps, step.data) == (6, SHORT["stream.path"])
        assert {patch.metadata.base for patch in patches} == {step.parent}
        for patch in patches[1:]:
            assert torch.equal(patch.ids, patches[0].ids)
            assert torch.equal(patch.old, patches[0].old)
            torch.testing.assert_close(patch.new, patches[0].new, rtol=0, atol=1e-9)


def test_distinct_rows_are_counted_over_all_ranks(runs: Path) -> None:
    for name in ("tfidf", "table each"):
        expected = distinct_rows(runs / "1" / name)
        assert expected[0] < expected[-1]
        for placement in ("1", "2", "4", "2x2"):
            assert metrics(runs / placement / name, "sparse/distinct_rows") == expected


def learn_until(rank: int, ranks: int, folder: str, settings: dict[str, Any], step: int) -> None:
    """A sparse run of which one rank is asked to stop during a step."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    config = load_config(arguments(Path(folder), settings, CONFIG))
    check(config, ranks)
    trainer = Trainer(config)
    train_step = trainer.train_step

    def asked_to_stop(batches: Iterator[Any]) -> tuple[dict[str, float], bool]:
        if trainer.step == step and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batches)

    trainer.train_step = asked_to_stop  # type: ignore[assignment, method-assign]
    assert not trainer.train(), "it says that it was stopped"
    trainer.close()


def test_stopped_and_resumed_on_other_ranks_it_ends_as_if_never_stopped(
    runs: Path, bases: Path, tmp_path: Path
) -> None:
    settings, run = exact(bases, "decay", RUNS["decay"]), tmp_path / "run"
    base = base_of(bases, "decay")
    run_on_ranks(learn_until, 4, str(run), settings | HSDP | {"checkpoint.interval": 100}, 4)
    assert check_own_patch(run, base).metadata.lineage[0].steps == 4
    run_on_ranks(learn, 2, str(tmp_path), {"run": settings})
    check_resumed(run, runs / "1/decay", base)


def check_resumed(run: Path, straight: Path, base: Path) -> Patch:
    """A run that was interrupted has ended as one that was not, on any number of ranks."""
    assert selections(run) == selections(straight)
    assert metrics(run) == pytest.approx(metrics(straight), rel=0, abs=1e-10)
    assert metrics(run, "sparse/distinct_rows") == distinct_rows(straight)
    assert metrics(run, "sparse/overlap") == metrics(straight, "sparse/overlap")
    patch, whole = check_own_patch(run, base), load_patch(str(straight / "patch.safetensors"))
    assert patch.metadata.base == whole.metadata.base
    assert torch.equal(patch.ids, whole.ids)
    torch.testing.assert_close(patch.new, whole.new, rtol=0, atol=1e-9)
    return patch


def test_killed_at_any_moment_and_resumed_it_ends_as_if_never_killed(
    runs: Path, bases: Path, tmp_path: Path
) -> None:
    settings = exact(bases, "tfidf", RUNS["tfidf"])
    killed = tmp_path / "killed"
    words = arguments(killed, settings | {"checkpoint.interval": 1}, CONFIG)
    processes = start_ranks(2, *words, program=("-m", "titan_smf.train"))
    wait_for_step(killed, random.randint(1, 3), processes)
    time.sleep(random.uniform(0, 0.1))
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes, code=-signal.SIGKILL)
    assert not (killed / "patch.safetensors").exists(), "it was killed before its end"
    straight, base = runs / "2/tfidf", base_of(bases, "tfidf")
    for ranks in (1, 2):
        run = tmp_path / f"{ranks}"
        shutil.copytree(killed, run)
        run_on_ranks(learn, ranks, str(tmp_path), {run.name: settings})
        patch = check_resumed(run, straight, base)
    whole = load_patch(str(straight / "patch.safetensors"))
    assert patch.metadata.result == whole.metadata.result, "on as many ranks, bit for bit"


def learn_from_patches(rank: int, ranks: int, folder: str, bases: str, first: str) -> None:
    """Runs from a base and patches, one from the checkpoint that they lead to, and refused ones."""
    from titan_smf.training.run_patch import apply_patches

    settings = exact(Path(bases), "tfidf", RUNS["tfidf"])
    settings |= {"stream.path": "synthetic:world?facts=300&new_facts=4&seed=1"}
    p1, p2 = f"{first}/patch.safetensors", f"{folder}/second/patch.safetensors"
    start, patches = "checkpoint.initial_load_path", "checkpoint.initial_patches"
    learn(rank, ranks, folder, {"second": settings | {patches: json.dumps([p1])}})
    learn(rank, ranks, folder, {"same": settings | {start: first}})
    both = settings | {patches: json.dumps([p1, p2]), "training.steps": 1}
    learn(rank, ranks, folder, {"third": both})
    adapters = {"finetune.method": "lora", "selection.ranking": "tf"}
    learn(rank, ranks, folder, {"beside the patch": both | adapters})
    refused = {
        "is of other weights": settings | {patches: json.dumps([p2])},
        "patch 2 changes weights with": settings | {patches: json.dumps([p2, p1])},
        "patch is of another model: ": settings
        | {patches: json.dumps([p1]), start: f"{bases}/table each"}
        | TABLE_EACH,
    }
    for number, (message, wrong) in enumerate(refused.items()):
        with pytest.raises(PatchError, match=f"^checkpoint.initial_patches, .*: .*{message}"):
            learn(rank, ranks, folder, {f"refused {number}": wrong | {"selection.ranking": "tf"}})
    with pytest.raises(ConfigError, match=r"initial_patches: got .*without memory"):
        apply_patches(SimpleNamespace(value_tables=lambda: iter(())), [p1])  # type: ignore[arg-type]


def test_a_run_starts_from_a_base_and_patches(runs: Path, bases: Path, tmp_path: Path) -> None:
    first = runs / "4/tfidf"
    run_on_ranks(learn_from_patches, 2, str(tmp_path), str(bases), str(first))
    base, second = base_of(bases, "tfidf"), tmp_path / "second"
    p1, p2 = (load_patch(str(run / "patch.safetensors")) for run in (first, second))
    p3 = load_patch(str(tmp_path / "third/patch.safetensors"))
    assert p2.metadata.base == p1.metadata.result
    assert [step.parent for step in p2.metadata.lineage] == [p1.metadata.result]
    assert bits(check_own_patch(tmp_path / "same", first)) == bits(p2)
    chained = chain([p1, p2])
    exported = export_patch(base, second, "", print)
    assert bits(chained) == bits(exported)
    assert chained.metadata.result == exported.metadata.result == p3.metadata.base
    assert [step.parent for step in chain([p1, p2, p3]).metadata.lineage] == [
        p1.metadata.base,
        p1.metadata.result,
        p2.metadata.result,
    ]


def count_in_two_goes(rank: int, ranks: int, folder: str, base: str) -> None:
    settings = EXACT | DOCUMENTS | {"checkpoint.initial_load_path": base}
    count(rank, ranks, folder, settings | {"idf.num_batches": 3})
    if rank == 0:
        path = Path(folder) / "idf.safetensors"
        path.rename(path.with_name(path.name + ".partial"))
    torch.distributed.barrier()
    few = {"idf.num_batches": 2, "idf.path": f"{folder}/idf.safetensors"}
    with pytest.raises(ConfigError, match=r"idf.num_batches: got 2; allowed: 3 or more"):
        count(rank, ranks, f"{folder}/few", settings | few)
    count(rank, ranks, folder, settings | {"replay.share": 0.5, "optimizer.name": "SGD"})


def test_counts_do_not_depend_on_ranks_or_interruptions(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "tfidf")
    run_on_ranks(count_in_two_goes, 4, str(tmp_path), str(base))
    assert (tmp_path / "idf.safetensors").read_bytes() == idf_of(bases).read_bytes()
    assert (tmp_path / "document_frequency.png").stat().st_size > 10_000


def test_a_count_that_is_killed_ends_with_the_same_file(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "tfidf")
    settings = EXACT | DOCUMENTS | {"checkpoint.initial_load_path": base}
    path = tmp_path / "idf.safetensors"
    partial = path.with_name(path.name + ".partial")
    words = arguments(path.parent, settings, IDF_CONFIG)
    processes = start_ranks(2, *words, program=[str(ROOT / "tools/compute_idf.py")])
    while not partial.exists():
        assert all(process.poll() is None for process in processes), "a rank ended early"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes, code=-signal.SIGKILL)
    assert not path.exists(), "it was killed before its end"
    run_on_ranks(count, 1, str(path.parent), settings)
    assert path.read_bytes() == idf_of(bases).read_bytes()
    assert not partial.exists(), "the complete file replaces it"
