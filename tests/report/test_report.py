"""The tables of a report: numbers are worked out by hand here."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from tests.support.report_runs import (
    FULL,
    SPARSE,
    notes,
    report,
    scores,
    table,
    write_lines,
    write_run,
)
from titan_smf.report.estimates import Estimate, over_seeds, t_quantile
from titan_smf.report.slot_usage import Selections
from titan_smf.sparse.idf_file import IdfMetadata, IdfModel, save_idf


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
    assert {n: t_quantile(n) for n in printed} == pytest.approx(printed, abs=6e-5)


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


def test_table_of_learning_and_forgetting(root: Path) -> None:
    for seed, (learned, known) in enumerate([(0.7, 0.76), (0.8, 0.72), (0.9, 0.68)]):
        write_run(root / f"a{seed}", SPARSE, 100.0, seed, scores(learned, known, 1.001))
        write_run(root / f"b{seed}", SPARSE, 400.0, seed, scores(0.99, 0.1))
        write_run(root / f"c{seed}", FULL, 1e-4, seed, scores(0.8, 0.4, 1.3), kind="full")
    (root / "chosen.json").write_text(json.dumps({SPARSE: 100.0, FULL: 1e-4}))
    text = report(root)
    rows = table(text, "Learning and forgetting")
    assert rows[SPARSE] == {
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
    }
    assert rows.keys() == {SPARSE, FULL}
    ends = ["0.800", "0.800 → 0.400", "0.400, 50.0%", "1.000 → 1.300", "0.300"]
    assert list(rows[FULL].values()) == [FULL, "0.0001", "3", "1,600", "0.000", *ends]
    assert "One seed" not in text.split("Intervals are")[0]
    assert "Nothing." in notes(text)
    assert text.count(f"\n| {SPARSE} | 400 | ") == 3, "all runs are listed, of other rates too"


def test_without_a_chosen_rate_every_rate_is_shown_and_one_seed_is_said(root: Path) -> None:
    write_run(root / "a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    write_run(root / "b", SPARSE, 400.0, 0, scores(0.9, 0.6))
    text = report(root)
    assert re.findall(rf"\| {SPARSE} \| (\d+) \| 1 \| .*", text) == ["100", "400"]
    assert "0.700 [0.600, 0.800]" in text, "the interval of the questions"
    assert "**One seed only: all methods." in text
    assert "No rate was chosen" in text


def test_intervals_of_what_was_lost_stay_possible(root: Path) -> None:
    for seed, known in enumerate([0.05, 0.75]):  # t-interval of the loss: 0.4 plus or minus 4.4
        write_run(root / f"{seed}", SPARSE, 1.0, seed, scores(0.7, known, 1.0 + known))
    row = table(report(root), "Learning and forgetting")[SPARSE]
    assert row["known_facts F1 lost"] == "0.400, 50.0% [\N{MINUS SIGN}0.200, 0.800]"
    assert row["background loss rise"] == "0.400 [\N{MINUS SIGN}1.000, 4.847]"


def test_targets_are_compared_apart(root: Path, tmp_path: Path) -> None:
    write_run(root / "a", SPARSE, 100.0, 0, scores(0.7, 0.76))
    tuning = write_run(root / "b", SPARSE, 100.0, 0, scores(0.9, 0.6))
    lines = (tuning / "results.jsonl").read_text().replace("new_facts", "tuning_facts")
    (tuning / "results.jsonl").write_text(lines)
    text = report(root)
    assert re.findall("^## Target: (.*)$", text, re.MULTILINE) == ["new_facts", "tuning_facts"]
    assert "Nothing." in notes(text), "not the same run twice"
    assert "Slot usage" not in text, "no selections were logged"
    assert len(list((tmp_path / "report").glob("known-facts-against-learning*.png"))) == 2


def test_torn_selections_are_named(root: Path) -> None:
    run = write_run(root / "a", SPARSE, 1.0, 0, scores(0.7, 0.7))
    write_lines(run / "selections.jsonl", [{"step": 1, "slots": ["one"]}])
    text = report(root)
    assert "Slot usage" not in text
    assert f"{run}/selections.jsonl: not used" in notes(text)


def test_slot_usage_by_hand(root: Path, tmp_path: Path) -> None:
    selections = Selections([torch.tensor(ids).numpy() for ids in ([1, 2], [2, 3], [4, 2])])
    assert selections.overlap_of_neighbours == 0.5
    assert selections.overlap_of_pairs == 0.5  # slot 2 in three pairs, of three
    assert [list(values) for values in selections.times] == [[1, 2, 3, 4], [1, 3, 1, 1]]
    assert Selections(selections.sets[:1]).overlap_of_pairs is None

    df = torch.tensor([10, 1, 0, 5, 10, 0, 0, 0], dtype=torch.int32)
    model = IdfModel(8, 1, [2], "bytes", "a", "b")
    save_idf(
        str(root / "idf.safetensors"), df, df.long(), IdfMetadata(model, "", 1, 1, [[0, 10]], True)
    )
    for method, name, last in (
        ("with df", "idf", 2),
        ("df gone", "gone", 2),
        ("df of others", "idf", 9),
    ):
        idf_path = f"{name}.safetensors"
        run = write_run(root / method, method, 1.0, 0, scores(0.7, 0.7), idf_path=idf_path)
        steps = [[1, 2], [2, 3], [4, last]]
        write_lines(run / "selections.jsonl", [{"step": 1, "slots": ids} for ids in steps])
    text = report(root)
    rows = table(text, "Slot usage")
    assert rows.keys() == {"with df", "df gone", "df of others"}
    assert list(rows["with df"].values())[1:7] == ["3", "2", "4", "75.0%", "50.0%", "50.0%"]
    # Selected df, of 10: 0 0 0 1 5 10
    assert rows["with df"]["df, 50% of selections below"] == "5.0%"
    assert rows["with df"]["df, 90% of selections below"] == "75.0%"
    assert set(list(rows["df gone"].values())[7:]) == {"—"}
    assert "gone.safetensors" in notes(text)
    assert "8 slots, and slot 9 selected" in notes(text)
    assert (tmp_path / "report/slot-usage.png").is_file()
