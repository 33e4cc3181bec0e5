"""Sparse finetuning changes the selected rows and nothing else, the same on every placement."""

from pathlib import Path

import pytest
import torch

from tests.support.launch import run_on_ranks
from tests.support.sparse_runs import (
    CHANGED,
    PLACEMENTS,
    RUNS,
    SHORT,
    base_of,
    check_own_patch,
    distinct_rows,
    only_selected_rows_changed,
)
from tests.support.training_runs import TABLE_EACH, Settings, metrics, selections, train


@pytest.mark.parametrize("placement", ["2", "4", "2x2"])
def test_selections_and_losses_do_not_depend_on_the_placement(
    sparse_runs: Path, placement: str
) -> None:
    for name in RUNS:
        one, several = sparse_runs / "1" / name, sparse_runs / placement / name
        assert selections(several) == selections(one), name
        losses = metrics(one)
        assert len(losses) == 6
        assert metrics(several) == pytest.approx(losses, rel=0, abs=1e-10), name
        norms = metrics(one, "grad_norm")
        assert metrics(several, "grad_norm") == pytest.approx(norms, rel=0, abs=1e-10), name


def test_gradient_accumulation_does_not_change_the_selection(sparse_runs: Path) -> None:
    assert selections(sparse_runs / "1/one micro-batch") == selections(sparse_runs / "1/tf")
    losses = metrics(sparse_runs / "1/tf")
    assert metrics(sparse_runs / "1/one micro-batch") == pytest.approx(losses, rel=0, abs=1e-10)


def test_padding_does_not_change_the_selection(sparse_runs: Path) -> None:
    assert selections(sparse_runs / "1/padded more") == selections(sparse_runs / "1/padded")
    losses = metrics(sparse_runs / "1/padded")
    assert metrics(sparse_runs / "1/padded more") == pytest.approx(losses, rel=0, abs=1e-10)


def test_activation_checkpointing_does_not_change_the_selection(sparse_runs: Path) -> None:
    for placement in PLACEMENTS:
        folder = sparse_runs / placement
        assert selections(folder / "checkpointed") == selections(folder / "tf")


@pytest.mark.parametrize("name", CHANGED)
def test_only_selected_rows_change(sparse_runs: Path, name: str) -> None:
    only_selected_rows_changed(sparse_runs / "1" / name)


BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
COMPILED = {"compile.enable": "true"}


def check_rounding(folder: Path, ranks: int, techniques: dict[str, Settings]) -> None:
    """Only selected rows change, and nearly all slots are those of the plain float32 run."""
    all_runs = {"plain": SHORT} | {name: SHORT | more for name, more in techniques.items()}
    run_on_ranks(train, ranks, str(folder), all_runs, timeout=400)
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
    run_on_ranks(train, 2, str(tmp_path), {"two tables": SHORT | two_tables}, timeout=400)
    only_selected_rows_changed(tmp_path / "two tables")


def test_it_learns_what_it_is_given(tmp_path: Path) -> None:
    pretraining = {"training.steps": 60, "metrics.enable_tensorboard": "false"}
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
    run_on_ranks(train, 2, str(tmp_path), {"base": pretraining, "run": one_fact})
    losses = metrics(tmp_path / "run")
    assert losses[0] < metrics(tmp_path / "base")[0] - 1, "it starts from the base"
    assert losses[-1] < losses[0] - 0.15


def test_a_run_writes_the_patch_that_is_exported(sparse_runs: Path, bases: Path) -> None:
    for name in CHANGED:
        patches = [
            check_own_patch(sparse_runs / placement / name, base_of(bases, name))
            for placement in PLACEMENTS
        ]
        (step,) = patches[0].metadata.lineage
        assert (step.steps, step.data) == (6, SHORT["stream.path"])
        assert {patch.metadata.base for patch in patches} == {step.parent}
        for patch in patches[1:]:
            assert torch.equal(patch.ids, patches[0].ids)
            assert torch.equal(patch.old, patches[0].old)
            torch.testing.assert_close(patch.new, patches[0].new, rtol=0, atol=1e-9)


def test_distinct_rows_are_counted_over_all_ranks(sparse_runs: Path) -> None:
    for name in ("tfidf", "table each"):
        expected = distinct_rows(sparse_runs / "1" / name)
        assert expected[0] < expected[-1]
        for placement in PLACEMENTS:
            assert metrics(sparse_runs / placement / name, "sparse/distinct_rows") == expected
