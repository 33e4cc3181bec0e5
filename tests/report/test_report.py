"""The report says what the files of finished runs say: numbers are worked out by hand here."""

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from tests.support.report_runs import (
    FULL,
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
from titan_smf.report.document import Fragment, Section, write_document
from titan_smf.report.estimates import Estimate, over_seeds, t_quantile
from titan_smf.report.methods import Method
from titan_smf.report.pictures import legend, png, styles
from titan_smf.report.slot_usage import Selections
from titan_smf.sparse.idf_file import IdfMetadata, IdfModel, save_idf

TOOL = Path(__file__).parents[2] / "tools/report.py"


def test_t_quantiles_are_those_of_printed_tables() -> None:
    printed = {
        1: 12.7062,
        2: 4.30265,
        3: 3.18245,
        4: 2.77645,
        9: 2.26216,
        30: 2.04227,
        100: 1.98397,
    }
    assert {n: round(t_quantile(n), 9) for n in printed} == pytest.approx(printed, abs=6e-5)


def test_intervals_over_seeds_are_t_intervals_and_of_one_seed_its_own() -> None:
    three = over_seeds([Estimate(0.7), Estimate(0.8, 0.1, 0.9), Estimate(0.9)])
    assert three.mean == pytest.approx(0.8)
    assert three.high == pytest.approx(0.8 + 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert over_seeds([Estimate(0.7), Estimate(0.9)], 0.0, 1.0).high == 1.0, "no score above 1"
    one = Estimate(0.7, 0.6, 0.9)
    assert over_seeds([one]) == one
    assert over_seeds([Estimate(0.3)] * 3) == Estimate(0.3), "nothing varied: no interval"
    assert math.isnan(over_seeds([Estimate(0.7), Estimate(math.nan)]).mean)


def test_interval_of_a_difference_adds_the_distances_in_squares() -> None:
    difference = Estimate(0.9, 0.84, 0.95).minus(Estimate(0.6, 0.5, 0.68))
    assert (difference.mean, difference.low) == pytest.approx((0.3, 0.3 - 0.1))  # .06, .08
    assert difference.high == pytest.approx(0.3 + math.hypot(0.05, 0.1))
    assert Estimate(0.9).minus(Estimate(0.6, 0.5, 0.7)).low is None


def test_table_of_learning_and_forgetting(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for seed, (learned, known) in enumerate([(0.7, 0.76), (0.8, 0.72), (0.9, 0.68)]):
        write_run(root / f"a{seed}", SPARSE, 100.0, seed, scores(learned, known, 1.001))
        write_run(root / f"b{seed}", SPARSE, 400.0, seed, scores(0.99, 0.1))
        write_run(root / f"c{seed}", FULL, 1e-4, seed, scores(0.8, 0.4, 1.3), kind="full")
    (root / "chosen.json").write_text(json.dumps({SPARSE: 100.0, FULL: 1e-4}))
    text = report(root)
    assert table(text, "Learning and forgetting") == {
        SPARSE: {
            "method": SPARSE,
            "rate": "100",
            "seeds": "3",
            "trainable parameters per step": "1,600",
            "new_facts F1 before": "0.000",
            "new_facts F1 after": "0.800 [0.552, 1.000]",  # 4.30265 x .1 / sqrt 3
            "known_facts F1": "0.800 → 0.720",
            "known_facts F1 lost": "0.080, 10.0% [\N{MINUS SIGN}0.019, 0.179]",
            "background loss": "1.000 → 1.001",
            "background loss rise": "0.001",
        },
        FULL: {
            "method": FULL,
            "rate": "0.0001",
            "seeds": "3",
            "trainable parameters per step": "1,600",
            "new_facts F1 before": "0.000",
            "new_facts F1 after": "0.800",
            "known_facts F1": "0.800 → 0.400",
            "known_facts F1 lost": "0.400, 50.0%",
            "background loss": "1.000 → 1.300",
            "background loss rise": "0.300",
        },
    }
    assert "One seed" not in text.split("Intervals are")[0]
    assert "Nothing." in notes(text)
    assert text.count(f"\n| {SPARSE} | 400 | ") == 3, "all runs are listed, of other rates too"


def test_without_a_chosen_rate_every_rate_is_shown_and_one_seed_is_said(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_run(root / "a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    write_run(root / "b", SPARSE, 400.0, 0, scores(0.9, 0.6))
    text = report(root)
    rows = re.findall(rf"\| {SPARSE} \| (\d+) \| 1 \| .*", text)
    assert rows == ["100", "400"]
    assert "0.700 [0.600, 0.800]" in text, "the interval of the questions"
    assert "**One seed only: all methods." in text
    assert "No rate was chosen" in text


def test_the_rate_is_the_one_that_a_method_sweeps(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, rate in enumerate([1e-3, 4e-3]):
        run = write_run(root / f"{number}", "values", 1e-4, 0, scores(0.7, 0.8), kind="full")
        config = (run / "config.toml").read_text()
        (run / "config.toml").write_text(config.replace("value_lr = 0.123", f"value_lr = {rate}"))
    (root / "chosen.json").write_text(json.dumps({"values": 4e-3}))
    text = report(root)
    assert table(text, "Learning and forgetting")["values"]["rate"] == "0.004"
    assert "Nothing." in notes(text)


def test_runs_that_have_not_come_to_their_end_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_run(root / "done", SPARSE, 100.0, 0, scores(0.7, 0.76))
    begun = write_run(root / "begun", SPARSE, 200.0, 0, scores(0.2, 0.78))
    for name in ("results.jsonl", "metrics.jsonl"):
        lines = map(json.loads, (begun / name).read_text().splitlines())
        write_lines(begun / name, [line | {"step": line["step"] // 2} for line in lines])
    text = report(root)
    assert table(text, "Learning and forgetting")[SPARSE]["rate"] == "100"
    expected = f"{begun}: left out, evaluated until step 5, other runs of {SPARSE} until step 10"
    assert expected in notes(text)


def test_rates_chosen_in_a_folder_hold_for_the_runs_below_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
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


def test_intervals_of_what_was_lost_stay_possible(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for seed, known in enumerate([0.05, 0.75]):  # t-interval of the loss: 0.4 plus or minus 4.4
        ends = scores(0.7, known, 1.0 + known)
        write_run(root / f"{seed}", SPARSE, 1.0, seed, ends)
    row = table(report(root), "Learning and forgetting")[SPARSE]
    assert row["known_facts F1 lost"] == "0.400, 50.0% [\N{MINUS SIGN}0.200, 0.800]"
    assert row["background loss rise"] == "0.400 [\N{MINUS SIGN}1.000, 4.847]"


def test_a_legend_of_many_methods_stays_on_the_figure() -> None:
    plain, wide = "sparse memory, TF-IDF, t=500, AdamW, with replay ", "WMW" * 9 + " "
    looks = styles([Method(str(number), ()) for number in range(28)])
    assert len(set(map(repr, looks.values()))) == 28
    for name in (plain, wide):
        figure = Figure(figsize=(10, 5), layout="constrained")
        axes = figure.subplots()
        legend(figure, [(look, name + number) for number, look in looks.items()], "method")
        png(figure)
        drawn, box = figure.legends[0].get_window_extent(), axes.get_window_extent()
        assert 0 <= drawn.x0 < drawn.x1 <= figure.bbox.x1
        assert 0 <= drawn.y0 < drawn.y1 < box.y0, "below the panel"
        assert box.height > 0.7 * 5 * figure.dpi, "which keeps its size"


def test_targets_are_compared_apart(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_run(root / "a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    tuning = write_run(root / "b", SPARSE, 100.0, 0, scores(0.9, 0.6))
    lines = (tuning / "results.jsonl").read_text().replace("new_facts", "tuning_facts")
    (tuning / "results.jsonl").write_text(lines)
    text = report(root)
    assert re.findall("^## Target: (.*)$", text, re.MULTILINE) == ["new_facts", "tuning_facts"]
    assert "Nothing." in notes(text), "not the same run twice"
    assert len(list((tmp_path / "report").glob("known-facts-against-learning*.png"))) == 2


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
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
    write_lines(
        root / "startless/results.jsonl",
        [result("new_facts", 10, 0.6), result("known_facts", 5, 0.7)],
    )
    rateless = write_run(root / "rateless", "rateless", 1.0, 0, scores(0.7, 0.7))
    (rateless / "config.toml").write_text('[finetune]\nmethod = "sparse_memory"\n')
    (root / "toml").mkdir()
    (root / "toml/config.toml").write_text("[job\n")
    (root / "chosen.json").write_text(json.dumps({SPARSE: 100.0, "unfinished": 3.0}))
    (root / "good/chosen.json").write_text("[]")

    text = report(root)
    assert table(text, "Learning and forgetting")[SPARSE]["new_facts F1 after"].startswith("0.750")
    assert table(text, "Learning and forgetting")["startless"]["known_facts F1"] == "— → —"
    said = notes(text)
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


def test_only_what_finished_runs_found_themselves_counts(tmp_path: Path) -> None:
    root = tmp_path / "root"
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


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "root/a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    text = report(run.parent, run, run.parent / "../root")
    assert "Methods: 1. Runs: 1. " in text
    assert "Nothing." in notes(text)


def test_runs_without_a_seed_are_as_many_draws_of_chance(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, learned in (("a", 0.7), ("b", 0.8)):
        config = write_run(root / name, SPARSE, 100.0, 0, scores(learned, 0.8)) / "config.toml"
        config.write_text(config.read_text().replace("seed = 0\n", ""))
    text = report(root)
    row = table(text, "Learning and forgetting")[SPARSE]
    assert row["seeds"] == "2"
    assert row["new_facts F1 after"].startswith("0.750 [")
    assert "Nothing." in notes(text)


def test_steps_between_come_from_metrics_where_results_have_only_the_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "root/a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    path = run / "results.jsonl"
    ends = map(json.loads, path.read_text().splitlines())
    write_lines(path, [line for line in ends if line["step"] == 0 or line["set"] != "new_facts"])
    write_lines(run / "metrics.jsonl", [{"step": 10, "evaluation/new_facts/f1": 0.65}])
    row = table(report(run.parent), "Learning and forgetting")[SPARSE]
    assert row["new_facts F1 after"] == "0.650", "without an interval: metrics have none"


class Page(HTMLParser):
    """Elements, their attributes, and what a reader sees."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


def test_html_is_one_file_and_names_are_no_markup(tmp_path: Path) -> None:
    hostile = (
        '<script>alert("1")</script> $\\frac{$ | `x` ![a](http://b.c/d.png) *x* \u202e\u2028&amp;'
    )
    shown = '<script>alert("1")</script> $\\frac{$ | `x` ![a](http://b.c/d.png) *x* &amp;'
    ends = {**scores(0.7, 0.76), "../../<b>set</b>": (0.5, 0.4)}
    role = {"role": "held_out"}
    run = write_run(tmp_path / "root/a", hostile, 100.0, 0, ends)
    lines = [
        result(name, step, ends[name][step // 10], **role if "<b>" in name else {})
        for step in (0, 10)
        for name in ends
    ]
    write_lines(run / "results.jsonl", lines)
    text = report(tmp_path / "root")
    output = tmp_path / "report"
    content = (output / "report.html").read_text()
    page = Page(content)

    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b", "link", "iframe", "a", "object"}
    assert shown in page.seen
    sources = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    pictures = sorted(path.read_bytes() for path in output.glob("*.png"))
    assert len(pictures) == 4
    prefix = "data:image/png;base64,"
    assert all(source and source.startswith(prefix) for source in sources)
    embedded = [base64.b64decode(str(source).removeprefix(prefix)) for source in sources]
    assert sorted(embedded) == pictures
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert "default-src 'none'" in content
    assert re.search(r"<td>0\.700<br><small>\[0\.600, 0\.800\]</small></td>", content)
    assert not re.search(r"url\(|@import|src=\"http", content)
    assert {path.name for path in tmp_path.iterdir()} == {"root", "report"}, "nothing elsewhere"

    cells = len(table(text, "Learning and forgetting").popitem()[1])
    assert cells == 6 + 2 * 3, "a pipe in a name makes no cell"
    without_pictures = re.sub(r"\]\([a-z0-9-]+\.png\)", "", text)
    assert not re.search(r"<|(?<!\\)`|(?<!\\)\]\(", without_pictures)


def test_a_section_can_bring_html_of_its_own(tmp_path: Path) -> None:
    fragment = Fragment('<p style="color: red">core</p>', "core (in the HTML it is red)")
    write_document(tmp_path, "title", [Section("Accesses", [fragment])])
    assert fragment.html in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.md").read_text() == f"# title\n\n## Accesses\n\n{fragment.text}\n"


def test_slot_usage_by_hand(tmp_path: Path) -> None:
    selections = Selections([torch.tensor(ids).numpy() for ids in ([1, 2], [2, 3], [4, 2])])
    assert selections.overlap_of_neighbours == 0.5
    assert selections.overlap_of_pairs == 0.5  # slot 2 in three pairs, of three
    assert [list(values) for values in selections.times] == [[1, 2, 3, 4], [1, 3, 1, 1]]
    assert Selections(selections.sets[:1]).overlap_of_pairs is None

    root = tmp_path / "root"
    df = torch.tensor([10, 1, 0, 5, 10, 0, 0, 0], dtype=torch.int32)
    model = IdfModel(8, 1, [2], "bytes", "a", "b")
    save_idf(
        str(root / "idf.safetensors"), df, df.long(), IdfMetadata(model, "", 1, 1, [[0, 10]], True)
    )
    for number, method in enumerate(["with df", "df gone", "df of others"]):
        path = ["idf.safetensors", "gone.safetensors", "idf.safetensors"][number]
        run = write_run(root / f"{number}", method, 1.0, 0, scores(0.7, 0.7), idf_path=path)
        steps = [[1, 2], [2, 3], [4, 2 if number < 2 else 9]]
        write_lines(run / "selections.jsonl", [{"step": 1, "slots": ids} for ids in steps])
    text = report(root)
    rows = table(text, "Slot usage")
    assert list(rows["with df"].values())[1:7] == ["3", "2", "4", "75.0%", "50.0%", "50.0%"]
    # Selected df, of 10: 0 0 0 1 5 10
    assert rows["with df"]["df, 50% of selections below"] == "5.0%"
    assert rows["with df"]["df, 90% of selections below"] == "75.0%"
    assert set(list(rows["df gone"].values())[7:]) == {"—"}
    assert "gone.safetensors" in notes(text)
    assert "8 slots, and slot 9 selected" in notes(text)
    assert (tmp_path / "report/slot-usage.png").is_file()


def test_torn_selections_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "root/a", SPARSE, 1.0, 0, scores(0.7, 0.7))
    (run / "selections.jsonl").write_text('{"step": 1, "slots": ["one"]}\n')
    text = report(tmp_path / "root")
    assert "Slot usage" not in text
    assert f"{run}/selections.jsonl: not used" in notes(text)


def test_what_holds_no_run_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "root/a", SPARSE, 1.0, 0, scores(0.7, 0.7))
    with pytest.raises(UserError, match=r"empty: holds no run, .* give the job.dump_folder"):
        report(run.parent, tmp_path / "empty")
    with pytest.raises(UserError, match="gone: no such folder"):
        report(tmp_path / "gone")
    (run / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"(?s)nothing to report.*root/a: left out, it has no"):
        report(run.parent)
    assert not (tmp_path / "report").exists()


def test_tool_exits_with_2_and_a_message_or_names_what_it_wrote(tmp_path: Path) -> None:
    write_run(tmp_path / "root/a", SPARSE, 1.0, 0, scores(0.7, 0.7))
    (tmp_path / "empty").mkdir()
    output = str(tmp_path / "out")
    run_file = str(tmp_path / "root/a/config.toml")

    def tool(folder: str, output: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), str(tmp_path / folder), "--output", output]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for folder, where, message in (
        ("empty", output, f"{tmp_path}/empty: holds no run"),
        ("root", run_file, f"{run_file}: cannot be written: "),
    ):
        failed = tool(folder, where)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr.startswith(f"error: {message}")
        assert len(failed.stderr.splitlines()) == 1
    done = tool("root", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        f"{output}/{name}"
        for name in (
            "report.md",
            "report.html",
            "known-facts-against-learning.png",
            "background-against-learning.png",
            "learning-curves.png",
        )
    ]


def test_starts_without_torch() -> None:
    code = "import sys, titan_smf.report.write; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reads_the_configuration_that_runs_save(tmp_path: Path) -> None:
    from titan_smf.config.job import load_config, save_resolved

    root = tmp_path / "root"
    for method, key in (("sparse_memory", "memory.value_lr"), ("full", "optimizer.lr")):
        run = write_run(root / method, method, 0.0, 0, scores(0.7, 0.7))
        given = {"job.description": method, key: "0.25", "finetune.method": method}
        options = [f"--{name}={value}" for name, value in given.items()]
        save_resolved(load_config([*options, "--debug.seed=7"]), run / "config.toml")
    text = report(root)
    rows = table(text, "Learning and forgetting")
    assert {name: row["rate"] for name, row in rows.items()} == {
        "sparse_memory": "0.25",
        "full": "0.25",
    }
    assert "Seeds: 7." in text
