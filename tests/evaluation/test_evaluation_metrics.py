"""Answers score as SQuAD's definition says; intervals hold the mean as often as they claim."""

import random
import re

import numpy as np
import pytest

from titan_smf.evaluation.metrics import best, estimate, exact_match, f1, normalise

WORDS = [
    *("the", "a", "an", "The", "An", "THE", "then", "theatre", "anna", "Paris", "paris,", "PARIS."),
    *("New York", "new-york", "U.S.A.", "don't", "12,000", "$5", "...", "-", "(the)", "a.", ""),
    *("Édouard", "édouard", "e\u0301douard", "İstanbul", "straße", "北京", "“quoted”", "—"),
    *("\u00a0", "tab\there", "line\nbreak", "Ω", "🙂", "the_end", "a/b", "naïve", " "),
]


def by_the_definition(prediction: str, answer: str) -> tuple[float, float]:
    """F1 and exact match by precision and recall, letter by letter and word by word."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
        return [word for word in re.split(r"\s+", drop_articles(kept)) if word]

    def drop_articles(text: str) -> str:
        # An article stands between characters that are no part of a word.
        pieces = re.findall(r"\w+|\W+", text)
        return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces)

    got, wanted = words(prediction), words(answer)
    if not got or not wanted:
        return float(got == wanted), float(got == wanted)
    left = list(wanted)
    same = 0
    for word in got:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0, 0.0
    precision, recall = same / len(got), same / len(wanted)
    return 2 * precision * recall / (precision + recall), float(got == wanted)


def test_scores_are_those_of_the_definition_over_generated_pairs() -> None:
    draw = random.Random(0)
    seen = set()
    for _ in range(3000):
        pair = [" ".join(draw.choices(WORDS, k=draw.randrange(5))) for _ in range(2)]
        wanted_f1, wanted_match = by_the_definition(*pair)
        assert f1(*pair) == pytest.approx(wanted_f1, abs=1e-12), pair
        assert exact_match(*pair) == wanted_match, pair
        assert f1(*pair) >= exact_match(*pair)
        seen.add((0 < wanted_f1 < 1, wanted_match))
    assert seen == {(True, 0.0), (False, 0.0), (False, 1.0)}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Lord of the Rings!", "lord of rings"),
        ("a U.S.A. theatre", "usa theatre"),
        ("An\u00a0É", "é"),
        ("the", ""),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_the_best_answer_counts() -> None:
    answers = ("14 December 1972 UTC", "December 1972")
    assert best(f1, "in December 1972", answers) == pytest.approx(4 / 5)
    assert best(exact_match, "december 1972.", answers) == 1


def test_an_estimate_is_the_mean_with_an_interval_that_is_always_the_same() -> None:
    values = np.random.default_rng(1).random(200)
    first = estimate(values)
    assert first == estimate(values.tolist())
    assert first.mean == pytest.approx(values.mean())
    spread = values.std() / np.sqrt(len(values))
    assert first.mean - first.low == pytest.approx(1.96 * spread, rel=0.15)
    assert first.high - first.mean == pytest.approx(1.96 * spread, rel=0.15)
    certain = estimate([0.5, 0.5])
    assert (certain.low, certain.high) == (0.5, 0.5)


def test_a_ratio_is_over_all_tokens_not_a_mean_of_means() -> None:
    ratio = estimate([2.0, 30.0], weights=[1, 10])
    assert ratio.mean == pytest.approx(32 / 11)
    assert (ratio.low, ratio.high) == (2.0, 3.0)


def test_intervals_hold_the_truth_about_as_often_as_they_claim() -> None:
    draw = np.random.default_rng(2)
    intervals = [estimate(draw.random(100) < 0.7, resamples=300) for _ in range(200)]
    held = sum(interval.low <= 0.7 <= interval.high for interval in intervals)
    assert 0.89 <= held / 200 <= 0.99
