"""What version 0.1.0 wrote, before its modules moved, is still read: runs, counts and patches.

`written_by_0_1_0` has, of a model of 7,500 parameters on two ranks: `pretrain`, a run of eight
steps stopped after the sixth; `idf.safetensors`, counts for its step 6; `sparse`, a sparse
finetuning of six steps from there, stopped after the third. The metrics, selections and patch in
them are those of the runs that were not stopped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_on_ranks

WRITTEN = Path(__file__).with_name("written_by_0_1_0")
PATCH_TOOL = Path(__file__).parents[2] / "tools/patch.py"


def go_on(rank: int, ranks: int, folder: str) -> None:
    """Resume the pretraining and the sparse finetuning, and start the latter anew."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    base = f"{WRITTEN}/pretrain"
    weights = ["--checkpoint.initial_load_path", base]
    weights += ["--selection.idf_path", f"{WRITTEN}/idf.safetensors"]
    for name, like, more in (
        ("pretrain", "pretrain", []),
        ("sparse", "sparse", weights),
        ("anew", "sparse", weights),
    ):
        words = ["--job.config", f"{WRITTEN}/{like}/config.toml", *more]
        config = load_config([*words, "--job.dump_folder", f"{folder}/{name}"])
        check(config, ranks)
        trainer = Trainer(config)
        assert trainer.train()
        trainer.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    for name in ("pretrain", "sparse"):
        shutil.copytree(WRITTEN / name, folder / name)
        metrics = folder / name / "metrics.jsonl"
        last = int((folder / name / "last_checkpoint").read_text().removeprefix("step-"))
        kept = [line for line in lines(metrics) if line["step"] <= last]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
    run_on_ranks(go_on, 1, str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "like"), [("pretrain", "pretrain"), ("sparse", "sparse"), ("anew", "sparse")]
)
def test_runs_go_on_with_the_losses_of_those_that_were_not_stopped(
    resumed: Path, name: str, like: str
) -> None:
    expected = [line["loss"] for line in lines(WRITTEN / like / "metrics.jsonl")]
    found = [line["loss"] for line in lines(resumed / name / "metrics.jsonl")]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["sparse", "anew"])
def test_counts_select_the_slots_that_they_selected(resumed: Path, name: str) -> None:
    selections = [
        lines(folder / "selections.jsonl") for folder in (WRITTEN / "sparse", resumed / name)
    ]
    expected, found = [[line["slots"] for line in each] for each in selections]
    assert found == expected


def test_the_patch_leads_from_the_base_to_its_result_and_back(tmp_path: Path) -> None:
    patch = WRITTEN / "sparse/patch.safetensors"

    def tool(*words: object) -> str:
        command = [sys.executable, str(PATCH_TOOL), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    applied = tool("apply", WRITTEN / "pretrain", patch, "--output", tmp_path / "with")
    reverted = tool("revert", tmp_path / "with", patch, "--output", tmp_path / "without")
    assert "weights e8719cf5db6144b3feab8efd1bbb4580" in applied
    assert "weights 238a3857667b1b0ab405a6d9cb38cf51" in reverted
