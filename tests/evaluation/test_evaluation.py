"""Evaluation gives the same numbers for every placement, and leaves each result once."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_on_ranks
from tests.support.training_runs import CONFIG, EXACT, HSDP, ROOT, arguments, metrics
from titan_smf.storage import read_lines

WORLD = "synthetic:world?facts=300&new_facts=40"
HELLASWAG = [
    {"ctx": f"The {thing} is", "endings": ["small.", f"of {thing} and more", "not"], "label": "1"}
    for thing in ("mill", "long road", "boat", "old town hall", "sea")
]
GSM8K = [{"question": f"{n} and {n}?", "answer": f"It is {n + n}.\n#### {n + n}"} for n in range(7)]
SHORT = {
    "training.steps": 2,
    "lr_scheduler.warmup_steps": 1,
    "checkpoint.interval": 100,
    "validation.freq": 1,
    "metrics.enable_tensorboard": "false",
    "evaluation.interval": 1,
    "evaluation.max_new_tokens": 8,
    "evaluation.batch_size": 6,
    "evaluation.resamples": 50,
}


def sets(folder: Path) -> str:
    """One set of each kind, as the setting's value."""
    for name, rows in (("choices", HELLASWAG), ("gsm8k", GSM8K)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = {"name": "known", "path": f"{WORLD}&set=known_facts", "limit": 17, "role": "target"}
    # The run's own validation loss, in another way.
    text = {"name": "text", "path": "synthetic:world?facts=300&split=validation", "limit": 32}
    return json.dumps([questions, f"{folder}/choices.jsonl", f"{folder}/gsm8k.jsonl", text])


def results(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "results.jsonl")


def numbers(folder: Path) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Mean and interval of every metric of every set and step, each of which occurs once."""
    lines = results(folder)
    found = {
        (line["set"], line["step"]): {
            name: list(value.values()) for name, value in line["metrics"].items()
        }
        for line in lines
    }
    assert len(found) == len(lines), "no result twice"
    return found


def assert_close(
    got: Path, wanted: Path, rel: float, abs: float | None = None, step: int | None = None
) -> None:
    """The same numbers in two runs, at all steps or one."""
    found, expected = (
        {k: v for k, v in numbers(run).items() if step in (None, k[1])} for run in (got, wanted)
    )
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].keys() == values.keys()
        for metric, estimate in values.items():
            assert found[key][metric] == pytest.approx(estimate, rel, abs), (key, metric)


def train(rank: int, ranks: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """Run several trainings, and evaluate the last checkpoint of "memory" as the tool does."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.training.trainer import Trainer

    for name, settings in runs.items():
        config = load_config(arguments(Path(folder) / name, settings))
        check(config, ranks)
        trainer = Trainer(config)
        assert trainer.train()
        trainer.close()
        if name == "memory":
            words = ["--checkpoint.initial_load_path", f"{folder}/{name}"]
            evaluate(rank, ranks, [*words, "--job.dump_folder", f"{folder}/{name} again"])


def evaluate(rank: int, ranks: int, words: list[str]) -> None:
    """What the tool does."""
    from titan_smf.commands.evaluate import evaluate_checkpoint, evaluation_config
    from titan_smf.training.trainer import Trainer

    trainer = Trainer(evaluation_config(words, ranks))
    assert evaluate_checkpoint(trainer)
    trainer.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory model on 1, 2 and 4 ranks and on HSDP 2x2, in float64, and others on some."""
    folder = tmp_path_factory.mktemp("evaluation")
    every = SHORT | {"evaluation.sets": sets(folder)}
    exact = every | EXACT
    memory = {"memory": exact}
    others = {"dense": exact | {"memory.layers": "[]"}, "float32": every}
    unasked = {"unasked": SHORT | EXACT}
    run_on_ranks(train, 1, str(folder / "1"), memory | others, timeout=300)
    run_on_ranks(train, 2, str(folder / "2"), memory | others | unasked, timeout=300)
    run_on_ranks(train, 4, str(folder / "4"), memory, timeout=300)
    run_on_ranks(train, 4, str(folder / "2x2"), {"memory": exact | HSDP}, timeout=300)
    return folder


@pytest.mark.parametrize(
    ("placement", "name"),
    [("2", "memory"), ("4", "memory"), ("2x2", "memory"), ("2", "dense")],
)
def test_numbers_do_not_depend_on_the_placement(runs: Path, placement: str, name: str) -> None:
    assert sorted(numbers(runs / "1" / name)) == [
        (each, step) for each in ("choices", "gsm8k", "known", "text") for step in (0, 1, 2)
    ]
    assert_close(runs / placement / name, runs / "1" / name, rel=0, abs=1e-10)
    for each in ("known", "choices"):
        path = f"{name}/predictions/{each}.jsonl"
        assert (runs / placement / path).read_text() == (runs / "1" / path).read_text()


def test_float32_answers_do_not_depend_on_the_placement(runs: Path) -> None:
    path = "float32/predictions/known.jsonl"
    assert (runs / "2" / path).read_text() == (runs / "1" / path).read_text()
    assert_close(runs / "2/float32", runs / "1/float32", rel=1e-5)


@pytest.mark.parametrize("placement", ["1", "2", "4", "2x2"])
def test_a_checkpoint_gives_the_numbers_of_its_run(runs: Path, placement: str) -> None:
    run, again = runs / placement / "memory", runs / placement / "memory again"
    assert_close(again, run, step=2, rel=0, abs=1e-12)
    assert len(numbers(again)) == 4, "of that step alone"
    checkpoints = {line["checkpoint"] for line in results(again)}
    assert checkpoints == {str(run / "checkpoints/step-2")}


def test_the_loss_on_text_is_the_validation_loss(runs: Path) -> None:
    for name in ("memory", "dense"):
        losses = numbers(runs / "1" / name)
        ours = [losses["text", step]["loss"][0] for step in (1, 2)]
        theirs = metrics(runs / "1" / name, "evaluation/validation/loss")
        assert ours == pytest.approx(theirs, rel=0, abs=1e-10)


def test_evaluation_leaves_the_training_as_it_is(runs: Path) -> None:
    for name in ("loss", "grad_norm", "evaluation/validation/loss"):
        assert metrics(runs / "2/memory", name) == metrics(runs / "2/unasked", name)


def test_results_are_in_metrics_and_predictions_can_be_read(runs: Path) -> None:
    folder = runs / "1/memory"
    lines = {line["step"]: line for line in results(folder) if line["set"] == "known"}
    line = lines[2]
    assert line["role"] == "target"
    assert line["count"] == 17
    assert line["settings"]["template"] == "world"
    assert metrics(folder, "evaluation/known/f1") == [
        lines[step]["metrics"]["f1"]["mean"] for step in (0, 1, 2)
    ]
    predictions = read_lines(folder / "predictions/known.jsonl")
    assert len(predictions) == 17
    f1 = [prediction["f1"] for prediction in predictions]
    assert line["metrics"]["f1"]["mean"] == pytest.approx(sum(f1) / 17, abs=1e-4)
    fields = ["id", "question", "prediction", "answers", "f1", "exact_match"]
    assert list(predictions[0]) == fields
    right = [each["right"] for each in read_lines(folder / "predictions/choices.jsonl")]
    accuracy = numbers(folder)["choices", 2]["accuracy"][0]
    assert accuracy == pytest.approx(sum(right) / len(HELLASWAG))


def test_a_run_stopped_in_an_evaluation_goes_on_with_it(tmp_path: Path) -> None:
    """The stop comes between two sets of the evaluation after step 1."""
    folder = tmp_path / "run"
    settings = SHORT | {
        "checkpoint.interval": 1,
        "evaluation.sets": f"first={WORLD}&set=known_facts,second={WORLD}&set=new_facts",
    }
    assert run_on_ranks(stopped, 1, arguments(folder, settings)) == [75]
    before = [(line["set"], line["step"]) for line in results(folder)]
    assert before == [("first", 0), ("second", 0), ("first", 1)]
    run_on_ranks(train, 1, str(tmp_path), {"run": settings})
    assert sorted(numbers(folder)) == [(s, n) for s in ("first", "second") for n in (0, 1, 2)]
    assert {line["step"] for line in read_lines(folder / "metrics.jsonl")} == {0, 1, 2}


def stopped(rank: int, ranks: int, argv: list[str]) -> int:
    """Train, and ask for a stop as soon as there are three results; the exit code."""
    from titan_smf.commands.entry import exit_code_on_ranks
    from titan_smf.commands.train import main
    from titan_smf.evaluation.results import ResultsFile

    added = ResultsFile.add

    def add(self: ResultsFile, *args: Any, **kwargs: Any) -> None:
        added(self, *args, **kwargs)
        if len(self.path.read_text().splitlines()) == 3:
            signal.raise_signal(signal.SIGTERM)

    ResultsFile.add = add  # type: ignore[method-assign]
    return exit_code_on_ranks(main, argv)


def test_the_tool_needs_no_more_than_a_run_and_files(runs: Path) -> None:
    run = runs / "1/float32"
    before = results(run)
    words = ["--checkpoint.initial_load_path", str(run), "--evaluation.sets", f"{runs}/gsm8k.jsonl"]
    run_on_ranks(evaluate, 1, words)  # the tool's result takes the place of this one
    assert len(results(run)) == len(before) + 1
    tool = [sys.executable, str(ROOT / "tools/evaluate.py"), *words]
    found = subprocess.run(tool, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    line = next(line for line in found.stdout.splitlines() if line.startswith("gsm8k  7      nll "))
    after = results(run)
    assert after[:-1] == before
    assert f"{after[-1]['metrics']['nll']['mean']:.4f}" in line
    (trained,) = (b for b in before if (b["set"], b["step"]) == ("gsm8k", 2))
    assert after[-1]["metrics"] == trained["metrics"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint.initial_load_path: got None; allowed: the run or checkpoint to evaluate"),
        (["--checkpoint.initial_load_path", "nowhere"], "nowhere: no complete checkpoint there"),
    ],
)
def test_the_tool_says_what_it_needs(words: list[str], message: str) -> None:
    from titan_smf.commands.evaluate import evaluation_config
    from titan_smf.errors import UserError

    with pytest.raises(UserError) as error:
        evaluation_config(["--job.config", str(CONFIG), *words][2 * bool(words) :], 1)
    assert message in str(error.value)
