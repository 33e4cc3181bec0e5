"""Which runs a report uses, what it takes from their files, and what it leaves out."""

import json
from pathlib import Path

import pytest

from tests.support.report_runs import (
    SPARSE,
    notes,
    report,
    result,
    scores,
    table,
    write_lines,
    write_run,
)
from titan_smf.errors import UserError
from titan_smf.storage import read_lines


def test_rate_seeds_and_ends_of_each_method(root: Path) -> None:
    for rate in (1e-3, 4e-3):  # a method that sweeps the rate of the values, called "full"
        run = write_run(root / f"v{rate}", "values", 1e-4, 0, scores(0.7, 0.8), kind="full")
        config = (run / "config.toml").read_text()
        (run / "config.toml").write_text(config.replace("value_lr = 0.123", f"value_lr = {rate}"))
    (root / "chosen.json").write_text(json.dumps({"values": 4e-3}))
    for learned in (0.7, 0.8):
        run = write_run(root / f"s{learned}", "seedless", 100.0, None, scores(learned, 0.8))
    run = write_run(root / "ends", "from metrics", 100.0, 0, scores(0.7, 0.76))
    lines = read_lines(run / "results.jsonl")
    kept = [line for line in lines if line["step"] == 0 or line["set"] != "new_facts"]
    write_lines(run / "results.jsonl", kept)
    write_lines(run / "metrics.jsonl", [{"step": 10, "evaluation/new_facts/f1": 0.65}])
    write_run(root / "done", SPARSE, 100.0, 0, scores(0.7, 0.76))
    begun = write_run(root / "begun", SPARSE, 200.0, 0, scores(0.2, 0.78))
    for path in (begun / "results.jsonl", begun / "metrics.jsonl"):
        write_lines(path, [line | {"step": line["step"] // 2} for line in read_lines(path)])

    text = report(root)
    rows = table(text, "Learning and forgetting")
    assert rows["values"]["rate"] == "0.004", "the one that the method sweeps"
    assert rows["seedless"]["seeds"] == "2", "as many draws of chance"
    assert rows["seedless"]["new_facts F1 after"].startswith("0.750 [")
    after = rows["from metrics"]["new_facts F1 after"]
    assert after == "0.650", "without an interval: metrics have none"
    assert rows[SPARSE]["rate"] == "100", "a run that has not come to its end is left out"
    expected = f"{begun}: left out, evaluated until step 5, other runs of {SPARSE} until step 10"
    assert notes(text).strip() == f"- {expected}"


def test_rates_chosen_in_a_folder_hold_for_the_runs_below_it(root: Path) -> None:
    for seed, chosen in enumerate([100.0, 200.0]):
        for rate in (100.0, 200.0):
            write_run(root / f"s{seed}/{rate}", SPARSE, rate, seed, scores(rate / 400, 0.8))
        (root / f"s{seed}/chosen.json").write_text(json.dumps({SPARSE: chosen}))
    row = table(report(root), "Learning and forgetting")[SPARSE]
    assert (row["rate"], row["seeds"]) == ("100, 200", "2")
    lower = table(report(root / "s1/200.0"), "Learning and forgetting")[SPARSE]
    assert lower["rate"] == "200"
    assert "No rate was chosen" not in (root / "s1/report/report.md").read_text()
    assert row["new_facts F1 after"].startswith("0.375 ")


def test_what_cannot_be_read_is_named(root: Path) -> None:
    good = write_run(root / "good", SPARSE, 100.0, 0, scores(0.7, 0.76))
    with (good / "results.jsonl").open("a") as file:
        file.write(json.dumps(result("new_facts", 10, 0.75)) + "\n")  # evaluated again: it counts
        file.write(json.dumps(result("jokes", 10, 0.5, role="comic")) + "\n[1]\n{torn")
    write_run(root / "same", SPARSE, 100.0, 0, scores(0.1, 0.1))
    for name in ("unevaluated", "begun", "unfinished", "pretraining", "startless"):
        write_run(root / name, name, 100.0, 0, scores(0.7, 0.76))
    (root / "unevaluated/results.jsonl").unlink()
    write_lines(root / "begun/results.jsonl", [result("new_facts", 0, 0.0)])
    write_lines(root / "unfinished/metrics.jsonl", [{"step": 20, "loss": 1.0}])
    write_lines(root / "pretraining/results.jsonl", [result("background", 5, 1.0)])
    startless = [result("new_facts", 10, 0.6), result("known_facts", 5, 0.7)]
    write_lines(root / "startless/results.jsonl", startless)
    rateless = write_run(root / "rateless", "rateless", 1.0, 0, scores(0.7, 0.7))
    (rateless / "config.toml").write_text('[finetune]\nmethod = "sparse_memory"\n')
    (root / "toml").mkdir()
    (root / "toml/config.toml").write_text("[job\n")
    (root / "chosen.json").write_text(json.dumps({SPARSE: 100.0, "unfinished": 3.0}))
    (root / "good/chosen.json").write_text("[]")

    text = report(root)
    rows, said = table(text, "Learning and forgetting"), notes(text)
    assert rows[SPARSE]["new_facts F1 after"].startswith("0.750")
    assert rows["startless"]["known_facts F1"] == "— → —"
    for expected in (
        f"{root}/good/results.jsonl: left out 2 torn or unreadable lines: 9, 10",
        f"{root}/good/results.jsonl: left out a result of set 'jokes' at step 10",
        f"{root}/same: left out, {root}/good has the same description, rate and seed",
        f"{root}/unevaluated: left out, it has no results.jsonl: not evaluated",
        f"{root}/begun: left out, evaluated before the first step only",
        f"{root}/unfinished: evaluated at step 10 for the last time, trained to step 20",
        f"{root}/pretraining: left out, no target set of questions or choices",
        f"{root}/startless: new_facts was not evaluated before the first step",
        f"{root}/startless: known_facts was not evaluated at the end, step 10",
        f"{root}/toml/config.toml: run left out, cannot be read: ",
        f"{root}/rateless: left out, config.toml names no learning rate",
        f"{root}/good/chosen.json: not used",
        "unfinished: no run has the chosen rate 3; all rates are shown",
    ):
        assert expected in said, expected
    assert len(said.strip().split("\n")) == 14


def test_only_what_finished_runs_found_themselves_counts(root: Path) -> None:
    own = {"checkpoint": None}
    for name, last in (("finished", 10), ("on its way", 5)):
        folder = write_run(root / name, name, 1.0, 0, scores(0.7, 0.6))
        config = (folder / "config.toml").read_text() + "\n[training]\nsteps = 10\n"
        (folder / "config.toml").write_text(config)
        lines = [result("new_facts", step, 0.1 * step, **own) for step in (0, last)]
        later = result("new_facts", 10, 0.333, checkpoint="step-10, other shots")
        write_lines(folder / "results.jsonl", [*lines, later])
    text = report(root)
    found = table(text, "Learning and forgetting")
    assert found.keys() == {"finished"}
    assert found["finished"]["new_facts F1 after"].startswith("1.000")
    assert f"{root}/on its way: left out, it has come to step 5 of 10" in notes(text)
    assert f"{root}/finished: left out 1 results of tools/evaluate.py" in notes(text)


def test_a_run_given_twice_counts_once(root: Path) -> None:
    run = write_run(root / "a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    text = report(run.parent, run, run.parent / "../root")
    assert "Methods: 1. Runs: 1. " in text
    assert "Nothing." in notes(text)


def test_what_holds_no_run_is_one_message(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = write_run(root / "a", SPARSE, 1.0, 0, scores(0.7, 0.7))
    with pytest.raises(UserError, match=r"empty: holds no run, .* give the job.dump_folder"):
        report(run.parent, tmp_path / "empty")
    with pytest.raises(UserError, match="gone: no such folder"):
        report(tmp_path / "gone")
    (run / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"(?s)nothing to report.*root/a: left out, it has no"):
        report(run.parent)
    assert not (tmp_path / "report").exists()


def test_reads_the_configuration_that_runs_save(root: Path) -> None:
    from titan_smf.config.job import load_config, save_resolved

    for method, key in (("sparse_memory", "memory.value_lr"), ("full", "optimizer.lr")):
        run = write_run(root / method, method, 0.0, 0, scores(0.7, 0.7))
        given = {"job.description": method, key: "0.25", "finetune.method": method}
        options = [f"--{name}={value}" for name, value in given.items()]
        save_resolved(load_config([*options, "--debug.seed=7"]), run / "config.toml")
    text = report(root)
    rows = table(text, "Learning and forgetting")
    assert rows.keys() == {"sparse_memory", "full"}
    assert {row["rate"] for row in rows.values()} == {"0.25"}
    assert "Seeds: 7." in text
