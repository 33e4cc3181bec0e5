"""Scores of answers as SQuAD defines them, and bootstrap confidence intervals of means.

SQuAD (arXiv 1606.05250) compares answers as bags of words after removing case, punctuation, English
articles and extra space; version 2 (arXiv 1806.03822) adds what an empty answer is worth.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DRAWN_AT_ONCE = 1 << 20


def normalise(answer: str) -> str:
    """Return lower case without ASCII punctuation and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if both are the same once normalised, else 0."""
    return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of words, counted with repetition.

    With no words on one side it is 1 if there are none on both, else 0.
    """
    predicted, expected = normalise(prediction).split(), normalise(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def best(score: Callable[[str, str], float], prediction: str, answers: Iterable[str]) -> float:
    """Return the highest score of a prediction over all reference answers, at least one."""
    return max(score(prediction, answer) for answer in answers)


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def estimate(
    values: npt.ArrayLike, weights: npt.ArrayLike | None = None, resamples: int = 1000
) -> Estimate:
    """Return `sum(values) / sum(weights)` with its percentile bootstrap interval over the items.

    Items are drawn with replacement, from a generator of fixed seed: the same items give the same
    interval. Memory does not grow with `resamples`.

    Args:
        values: (items,), at least one.
        weights: (items,), what each value is a sum over, such as its number of tokens; 1 if left
            out.
        resamples: number of draws of as many items as there are.
    """
    over = np.asarray(values, dtype=np.float64)
    under = np.ones_like(over) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(0)
    at_once = max(1, _DRAWN_AT_ONCE // len(over))
    means = []
    for first in range(0, resamples, at_once):
        drawn = generator.integers(len(over), size=(min(at_once, resamples - first), len(over)))
        means.append(over[drawn].sum(1) / under[drawn].sum(1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(float(over.sum() / under.sum()), float(low), float(high))
