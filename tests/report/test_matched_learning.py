"""Forgetting at matched learning, each seed by itself: numbers are worked out by hand here."""

import math
from pathlib import Path

import pytest

from tests.support.report_runs import FULL, SPARSE, report, scores, table, write_run
from titan_smf.report.frontier import Matched, Point, at_learning, frontier
from titan_smf.report.matched import ratio

LORA, MATCHED = "LoRA, rank 8", "Forgetting at matched learning"


def matched(text: str, what: str) -> dict[str, list[str]]:
    """The cells of each method in the table of a set and level, after the method's name."""
    rows = table(text, MATCHED, f"{what}").items()
    return {name: list(row.values())[1:] for name, row in rows}


def test_frontier_keeps_what_no_other_run_beats_and_interpolates_between_neighbours() -> None:
    points = [
        Point(0.8, 0.30),
        Point(0.4, 0.02),
        Point(0.55, 0.20),  # beaten by the next one
        Point(0.6, 0.10),
        Point(0.8, 0.35),  # beaten by the first one
        Point(math.nan, 0.0),
        Point(0.9, math.inf),
    ]
    assert frontier(points) == [Point(0.4, 0.02), Point(0.6, 0.10), Point(0.8, 0.30)]
    expected = {0.4: 0.02, 0.5: 0.06, 0.6: 0.10, 0.65: 0.15, 0.8: 0.30}
    for level, forgetting in expected.items():
        matched = at_learning(points, level)
        assert matched is not None
        assert matched.forgetting == pytest.approx(forgetting)
        assert not matched.is_bound
    assert at_learning(points, 0.3) == Matched(0.02, is_bound=True), "it learned more"
    assert at_learning(points, 0.81) is None, "nothing is extrapolated"
    assert at_learning([], 0.5) is None


def test_scores_that_differ_by_rounding_alone_are_the_same() -> None:
    """Means of the same scores in another order: an AdamW run had 0.06944444444444445."""
    points = [Point(0.06944444444444443, 0.0), Point(0.06944444444444445, 0.05), Point(0.1, 0.2)]
    assert frontier(points) == [points[0], points[2]]
    same_loss = [Point(0.4, 0.1), Point(0.5, 0.1 + 1e-17), Point(0.6, 0.1 + 2e-17)]
    assert frontier(same_loss) == [same_loss[2]]
    assert at_learning([Point(0.4, 0.0), Point(0.5 - 1e-16, 0.1)], 0.5) == Matched(0.1, False)


def test_a_run_that_learned_more_and_forgot_less_bounds_the_levels_below_it() -> None:
    points = [Point(0.5, 0.10), Point(0.7, -0.05)]
    assert at_learning(points, 0.5) == Matched(-0.05, is_bound=True)
    assert at_learning(points, 0.7) == Matched(-0.05, is_bound=False)


def test_forgetting_at_matched_learning_seed_by_seed(root: Path) -> None:
    # Seed 0 loses .04 at .5 and .12 at .7, seed 1 .08 at .5 and .16 at .7, where it ends.
    for seed, extra in enumerate([0.0, 0.04]):
        for rate, learned, score in ((1.0, 0.4, 0.8), (2.0, 0.6, 0.72), (4.0, 0.7, 0.68)):
            ends = scores(learned, score - extra, 1.0 + 0.1 * learned)
            write_run(root / f"s{seed}-{rate}", SPARSE, rate, seed, ends)
    write_run(root / "more", SPARSE, 8.0, 0, scores(0.8, 0.4))
    # Full finetuning loses .16 at .5 and .32 at .6 of seed 0; LoRA at most .4 below .65 of seed 1.
    for rate, learned, score in ((1e-5, 0.4, 0.8), (1e-4, 0.6, 0.48)):
        ends = scores(learned, score)
        write_run(root / f"full-{rate}", FULL, rate, 0, ends, kind="full")
    write_run(root / "lora", LORA, 1e-4, 1, scores(0.65, 0.4), kind="lora")
    text = report(root)
    at = "known_facts F1 lost at new_facts F1"
    columns = ["method", "lost, seed 0", "lost, seed 1", f"÷ {LORA}", f"÷ {FULL}"]
    assert list(table(text, MATCHED, f"{at} 0.5\n")[SPARSE]) == columns
    assert matched(text, f"{at} 0.5\n") == {
        SPARSE: ["0.040, 5.0%", "0.080, 10.0%", "—, ≥ 0.20", "0.25, —"],
        LORA: ["—", "≤ 0.400, 50.0%", "itself", "—, —"],
        FULL: ["0.160, 20.0%", "—", "—, —", "itself"],
    }
    expected = ["0.080, 10.0%", "0.120, 15.0%", "—, ≥ 0.30", "0.25, —"]
    assert matched(text, f"{at} 0.6\n")[SPARSE] == expected
    at_most = f"{at} 0.8. Not reached on any seed: {LORA}; {FULL}\n"
    assert matched(text, at_most) == {SPARSE: ["0.400, 50.0%", "not reached"]}
    rise = matched(text, "background loss rise at new_facts F1 0.5\n")
    assert rise[SPARSE][:2] == ["≤ 0.000", "0.050"], "seed 0's run at .8 has no rise"
    assert rise[SPARSE][3] == "—, —", "full finetuning has none to divide by"
    assert f"might have learned more or lost less: {SPARSE}, 3 of 4 on seed 1.**" in text
    assert ", the most that" not in text, "fixed levels compare them all"
    assert "nothing is extrapolated" in text


def test_overview_means_over_all_seeds_or_says_how_many_there_are(root: Path) -> None:
    for seed, most in enumerate([0.25, 0.35]):
        for rate, learned, score in ((1.0, 0.15, 0.78), (2.0, most, 0.70 - 0.12 * seed)):
            write_run(root / f"{seed}-{rate}", SPARSE, rate, seed, scores(learned, score))
    write_run(root / "full", FULL, 1e-4, 0, scores(0.2, 0.4), kind="full")
    rows = table(report(root), "At a glance", "known_facts F1 lost where new_facts F1 has come to")
    # .065: .02 and half of .08 more, .02 and a quarter of .2 more
    costs = {"0.1": "≤ 0.020", "0.2": "0.065", "0.3": "1 of 2 seeds"}
    assert rows[SPARSE] == {"method": SPARSE, "seeds": "2", **costs}
    full = {"method": FULL, "seeds": "1", "0.1": "≤ 0.400", "0.2": "0.400", "0.3": "—"}
    assert rows[FULL] == full


def test_baselines_below_all_levels_are_compared_at_the_most_they_learned(root: Path) -> None:
    for seed, most in enumerate([0.2, 0.3]):
        # .016 lost at .1, .04 at .3
        for rate, learned, score in ((1.0, 0.1, 0.784), (2.0, 0.3, 0.76)):
            write_run(root / f"{seed}-{rate}", SPARSE, rate, seed, scores(learned, score))
        ends = scores(most, 0.7 - seed / 10)
        write_run(root / f"full {seed}", FULL, 1e-4, seed, ends, kind="full")
        write_run(root / f"worse {seed}", FULL, 1e-3, seed, scores(0.1, 0.1), kind="full")
        write_run(root / f"lora {seed}", LORA, 1e-4, seed, scores(0.05, 0.76), kind="lora")
    text = report(root)
    lost = "known_facts F1 lost"
    at = f"{lost} at new_facts F1"
    full = matched(text, f"{at} 0.200, 0.300, the most that {FULL} learned. Not reached on any")
    assert full == {
        SPARSE: ["0.028, 3.5%", "0.040, 5.0%", "0.28, 0.20"],
        FULL: ["0.100, 12.5%", "0.200, 25.0%", "itself"],
    }
    lora = matched(text, f"{at} 0.050, 0.050, the most that {LORA} learned\n")
    assert lora[SPARSE] == ["≤ 0.016, 2.0%", "≤ 0.016, 2.0%", "≤ 0.40, ≤ 0.40", "?, ?"]
    assert lora[FULL][2:] == ["≤ 2.50, ≤ 5.00", "itself"]
    assert f"{lost}: new_facts F1 0.5, 0.6, 0.7, 0.8 not reached by any." in text


def test_ratios_of_bounds_are_bounds_where_something_follows() -> None:
    exact, bound = (lambda loss, is_bound=b: Matched(loss, is_bound) for b in (False, True))
    assert ratio(exact(0.1), exact(0.4)) == "0.25"
    assert ratio(exact(-0.1), exact(0.4)) == "\N{MINUS SIGN}0.25"
    assert ratio(bound(0.1), exact(0.4)) == "≤ 0.25"
    assert ratio(exact(0.1), bound(0.4)) == "≥ 0.25"
    assert ratio(exact(-0.1), bound(0.4)) == ratio(bound(0.1), bound(0.4)) == "?"
    for nothing in (0.0, -0.1, math.nan):
        assert ratio(exact(0.1), exact(nothing)) == "—"


def test_a_run_that_diverged_is_named_and_reaches_no_frontier(root: Path) -> None:
    write_run(root / "a", FULL, 1e-4, 0, scores(0.7, 0.6), kind="full")
    write_run(root / "b", FULL, 1.0, 0, scores(0.9, 0.7, math.nan), kind="full")
    text = report(root)
    assert f"{root}/b: background is not finite at the end: the run has diverged" in text
    assert "1.000 → not finite" in text
    for level, lost in ((0.5, "≤ 0.000"), (0.6, "≤ 0.000"), (0.7, "0.000")):
        assert matched(text, f"background loss rise at new_facts F1 {level}\n")[FULL][0] == lost
    assert "background loss rise: new_facts F1 0.8 not reached by any." in text
