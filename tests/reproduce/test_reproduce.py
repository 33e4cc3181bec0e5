"""Plans of comparisons: what they say, that each run is run once, from the same weights."""

import logging
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_on_ranks
from tests.support.report_runs import write_lines
from tests.support.training_runs import ROOT
from titan_smf.config.checks import check
from titan_smf.errors import ConfigError, DataError
from titan_smf.reproduce.plan import Plan, given_settings, read_plan
from titan_smf.reproduce.runner import Runner
from titan_smf.reproduce.runs import choose_rates, chosen_rates, planned_runs
from titan_smf.reproduce.summary import summary
from titan_smf.storage import read_lines

WORLD = "synthetic:world?seed={seed}&facts=60&new_facts=2"
PLAN = f"""
[reproduce]
seeds = [3]
tuning_seed = 3
vocabulary = 300

[common.model]
flavor = "debug"

[common.training]
mixed_precision_param = "float32"

[pretrain]
data.sources = [{{ path = "{WORLD}" }}]
training = {{ steps = 4, seq_len = 32, local_batch_size = 2, global_batch_size = 4 }}

[count]
data.sources = [{{ path = "{WORLD}" }}]
idf = {{ num_batches = 3, batch_size = 4, seq_len = 32 }}
training.local_batch_size = 2

[learn]
stream = {{ path = "{WORLD}", epochs = 2 }}
training = {{ seq_len = 48, local_batch_size = 2, global_batch_size = 4 }}
lr_scheduler = {{ warmup_steps = 0, decay_ratio = 0.0 }}
metrics.log_freq = 1

[[learn.evaluation.sets]]
name = "new"
path = "{WORLD}"
kind = "questions"
role = "target"
template = "world"

[tune.stream]
epochs = 1

[bases.memory]

[bases.dense.memory]
layers = []

[[arms]]
name = "sparse memory"
base = "memory"
rate = ["memory.value_lr"]
rates = [0.5, 0.01]
settings = {{ finetune.method = "sparse_memory", selection.top_t = 20, optimizer.name = "SGD" }}

[[arms]]
name = "full, dense"
group = "dense"
base = "dense"
rate = ["optimizer.lr"]
rates = [1e-3]
settings = {{ finetune.method = "full" }}
"""


def plan_of(folder: Path, *words: str, text: str = PLAN) -> Plan:
    path = folder / "plan.toml"
    path.write_text(text)
    places = ["--reproduce.folder", f"{folder}/out", "--reproduce.base_folder", f"{folder}/bases"]
    return read_plan(["--job.config", str(path), *places, *words])


def test_a_run_has_the_settings_of_its_phases_base_and_arm(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--pretrain.training.steps", "7")
    sparse, dense = plan.arms
    pretraining = plan.pretraining("dense", 5)
    assert pretraining.training.steps == 7
    assert pretraining.memory.layers == []
    assert pretraining.debug.seed == 5
    assert "seed=5" in pretraining.data.sources[0].path
    learning = plan.learning(sparse, 5, 0.5, tuning=False)
    assert (learning.memory.value_lr, learning.stream.epochs) == (0.5, 2)
    assert learning.selection.top_t == 20
    assert learning.job.description == "sparse memory"
    assert "seed=5" in learning.stream.path
    assert plan.learning(sparse, 5, 0.5, tuning=True).stream.epochs == 1
    assert plan.learning(dense, 5, 1e-3, tuning=False).memory.layers == []
    assert [str(run) for run in planned_runs(plan)][:3] == [
        "sparse memory, rate 0.5, seed 3, tuning",
        "sparse memory, rate 0.5, seed 3",
        "sparse memory, rate 0.01, seed 3, tuning",
    ]


def test_an_arm_with_replay_is_run_without_and_with(tmp_path: Path) -> None:
    text = PLAN.replace('group = "dense"', "replay = true") + "\n[replay.stream]\nepochs = 3\n"
    plan = plan_of(tmp_path, text=text)
    names = ["sparse memory", "full, dense", "full, dense, replay"]
    assert [arm.name for arm in plan.arms] == names
    epochs = [plan.learning(arm, 0, 1e-3, tuning=False).stream.epochs for arm in plan.arms]
    assert epochs == [2, 2, 3]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'base = "dense"',
            'base = "dens"',
            "arms.base: got 'dens'; allowed: a base: memory, dense",
        ),
        ('"full, dense"', '"sparse memory"', "a name of its own"),
        ('"full, dense"', '"Sparse: memory"', "differ in letters or digits"),
        ("rates = [1e-3]", "rates = []", "one or more different numbers"),
        ("rates = [1e-3]", "rates = [-1e-3]", "one or more different numbers above 0"),
        ('"optimizer.lr"', '"optimizer.lrr"', "arms[1].rate: got 'optimizer.lrr'"),
        ("rates = [1e-3]", "rates = [1e-3, 0.001]", "one or more different numbers"),
        ("rates = [1e-3]", "rates = [inf]", "one or more different numbers above 0"),
        ('["optimizer.lr"]', "[]", "the settings that take the rate"),
        ('finetune.method = "full"', "stream.epochs = 1", "finetune.method among the settings"),
        ('"full, dense"', '".."', "differ in letters or digits"),
        ("seeds = [3]", "seeds = [3, 3]", "different numbers"),
        ("steps = 4", "step = 4", "pretrain.training.steps is the nearest setting"),
        ("[bases.dense.memory]", "[bases.dense.memry]", "memory"),
        ("selection.top_t", "selection.topt", "selection.top_t is the nearest setting"),
        ('group = "dense"', 'grup = "dense"', "arms[1]"),
        ("1e-3]", "1e-3]\nfactors = [1.0, 2.0]", "arms[1].factors: got [1.0, 2.0]"),
        ("1e-3]", "1e-3]\nfactors = [0.0]", "a number above 0 for each setting"),
    ],
)
def test_a_mistake_in_a_plan_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PLAN
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, text=PLAN.replace(old, new))
    assert message in str(error.value)
    assert "plan.toml" in str(error.value)


def test_what_a_plan_needs_is_looked_for_before_its_first_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"debug_full_ft.toml: arms: .* one table \[\[arms\]\]"):
        read_plan(["--job.config", str(ROOT / "train_configs/debug_full_ft.toml")])
    with pytest.raises(DataError, match=r"gone\.jsonl: does not exist"):
        Runner(plan_of(tmp_path, "--learn.stream.path", f"{tmp_path}/gone.jsonl")).run()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.toml"}, "nothing was begun"


@pytest.mark.parametrize("place", ["out", "out/runs", "out/tuning/seed-3", "out/analysis"])
def test_a_file_where_a_plan_keeps_a_folder_is_one_message(tmp_path: Path, place: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        Runner(plan_of(tmp_path)).run()
    folder = f"reproduce.folder: got '{tmp_path}/out'; allowed: a folder of runs, reports"
    assert str(error.value) == f"{folder} and analyses: {file} is a file"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "plan.toml"])


@pytest.mark.parametrize(
    "name", ["demo", "reproduce_cpu", "reproduce_gpu", "reproduce_paper", "reproduce_questions"]
)
def test_every_run_of_the_plans_here_has_settings_that_can_be(name: str) -> None:
    path = ROOT / f"train_configs/{name}.toml"
    plan = read_plan(["--job.config", str(path)])
    for run in planned_runs(plan):
        check(plan.pretraining(run.arm.base, run.seed), 1)
        config = plan.learning(run.arm, run.seed, run.rate, run.tuning)
        config.selection.idf_path = "counts"  # the runner's part
        check(config, 1)
        assert config.lr_scheduler.decay_ratio == 0, "what comes last is learned like the rest"
        assert any(each.role == "target" for each in config.evaluation.sets)  # type: ignore[union-attr]
        assert all(config.origins[key] for key in run.arm.rate)


def test_an_arm_says_what_takes_how_much_of_its_rate(tmp_path: Path) -> None:
    both = 'rate = ["optimizer.lr", "memory.value_lr"]\nfactors = [1.0, 2.5]'
    plan = plan_of(tmp_path, text=PLAN.replace('rate = ["optimizer.lr"]', both))
    config = plan.learning(plan.arms[1], 3, 1e-3, tuning=False)
    assert (config.optimizer.lr, config.memory.value_lr) == (1e-3, 2.5e-3)


def test_an_arm_without_a_choice_has_no_runs_for_tuning(tmp_path: Path) -> None:
    replayed = 'group = "dense"\nreplay = true\ntune = false'
    plan = plan_of(tmp_path, text=PLAN.replace('group = "dense"', replayed))
    tuned = {run.arm.name for run in planned_runs(plan) if run.tuning}
    assert tuned == {"sparse memory"}
    assert len([run for run in planned_runs(plan) if not run.tuning]) == 4


def test_arms_are_chosen_by_name_or_group(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--reproduce.arms", "dense")
    assert [arm.name for arm in plan.arms] == ["full, dense"]
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, "--reproduce.arms", "full, dense")
    message = str(error.value)
    assert message.startswith("command line: reproduce.arms: got 'full'; allowed: groups of arms,")
    assert "core, dense; or names, as full, dense. With commas" in message
    words = shlex.split(message[message.index("--reproduce.arms") :])
    assert [arm.name for arm in plan_of(tmp_path, *words).arms] == ["full, dense"]


def test_rates_are_chosen_by_what_is_learned_and_kept_of_tuning_facts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    scores = {0.5: (0.9, 0.2), 0.01: (0.6, 0.6), 1e-3: (0.1, 0.1)}
    for run in planned_runs(plan):
        learned, kept = scores[run.rate] if run.tuning else (1.0, 1.0)
        lines = [
            {"step": 0, "role": "target", "metrics": {"f1": {"mean": 1.0}}},
            {"step": 2, "role": "target", "metrics": {"f1": {"mean": learned}}},
            {"step": 2, "role": "held_out", "metrics": {"f1": {"mean": kept}}},
            {"step": 2, "role": "background", "metrics": {"loss": {"mean": 9.0}}},
        ]
        run.folder.mkdir(parents=True)
        write_lines(run.folder / "results.jsonl", lines)
    assert choose_rates(plan) == {"sparse memory": 0.01, "full, dense": 1e-3}


def test_what_is_complete_is_known_again_in_another_placement(tmp_path: Path) -> None:
    words = ["--common.parallelism.data_parallel_replicate_degree", "2"]
    here, there = (plan_of(tmp_path, *more).pretraining("memory", 3) for more in ([], words))
    assert given_settings(here) == given_settings(there)


def run_plan(rank: int, ranks: int, folder: str, *words: str) -> dict[str, Any]:
    """Run a plan twice in one process; what was run the second time."""
    logging.getLogger("titan_smf").setLevel(logging.WARNING)
    plan = plan_of(Path(folder), *words)
    Runner(plan).run()
    times = {file: file.stat().st_mtime_ns for file in Path(folder).rglob("results.jsonl")}
    Runner(plan_of(Path(folder), *words)).run()
    again = [file for file, time in times.items() if file.stat().st_mtime_ns != time]
    with pytest.raises(ConfigError) as error:
        Runner(plan_of(Path(folder), *words, "--learn.stream.epochs", "3")).run()
    return {"runs": len(times), "again": again, "error": str(error.value)}


def test_each_run_is_run_once_from_the_same_weights(tmp_path: Path) -> None:
    (found,) = run_on_ranks(run_plan, 1, str(tmp_path), timeout=300)
    assert found["runs"] == 6, "two rates and one, for tuning and for the report"
    assert not found["again"], "complete runs are not run again"
    assert "stream.epochs was 2 there and is 3 here" in found["error"]
    runs = tmp_path / "out/runs"
    files = (runs / "seed-3/sparse-memory").glob("*/metrics.jsonl")
    losses = [read_lines(file)[1]["loss"] for file in files]
    assert len(losses) == 2
    assert losses[0] == losses[1], "the first loss is that of the base"
    plan = plan_of(tmp_path)
    assert chosen_rates(plan).keys() == {"sparse memory", "full, dense"}
    lines = summary(plan).splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["method", "sparse memory", "full, dense"]
    assert "One seed" in lines[-1]
