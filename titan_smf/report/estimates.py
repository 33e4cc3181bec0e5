"""Means with 95% intervals, over seeds where there are several and over questions where not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

HOW = (
    "Intervals are of 95%. With several seeds: the t-interval of the mean over the seeds' values. "
    "It takes seeds as independent and roughly normal, is wide with two or three of them for good "
    "reason, and holds the chance in the choice of questions only as far as seeds ask different "
    "ones. Seeds with one and the same value, such as scores of one base model, have none. "
    "Nothing goes beyond what is possible: scores lie between 0 and 1, no more is lost than the "
    "start had or gained than it left. With one seed: the bootstrap over questions that the "
    "evaluation made, which says nothing about another seed; for differences the intervals of both "
    "ends are joined as if they were independent, which is too wide rather than too narrow for the "
    "same questions asked twice."
)


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; no interval, both None, where there is no way to tell."""

    mean: float
    low: float | None = None
    high: float | None = None

    def minus(self, other: "Estimate") -> "Estimate":
        """Returns the difference, with the interval of independent estimates.

        The square-and-add rule (Zou and Donner 2008): each bound lies as far from the difference
        as the two bounds that it is made of lie from their means, added in squares.
        """
        mean = self.mean - other.mean
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return Estimate(mean)
        return Estimate(
            mean,
            mean - math.hypot(self.mean - self.low, other.high - other.mean),
            mean + math.hypot(self.high - self.mean, other.mean - other.low),
        )


def over_seeds(
    estimates: Sequence[Estimate], least: float = -math.inf, most: float = math.inf
) -> Estimate:
    """Returns the mean over seeds with its t-interval; of one seed, its own estimate.

    Seeds with one and the same value (scores of one base model) have no interval: nothing was
    drawn twice.

    Args:
        estimates: one or more, a seed each.
        least, most: the values that are possible; the interval is cut to them.
    """
    number = len(estimates)
    if number == 1:
        return estimates[0]
    if len({estimate.mean for estimate in estimates}) == 1:
        return Estimate(estimates[0].mean)
    mean = math.fsum(estimate.mean for estimate in estimates) / number
    if not math.isfinite(mean):
        return Estimate(mean)
    variance = math.fsum((e.mean - mean) ** 2 for e in estimates) / (number - 1)
    half = t_quantile(number - 1) * math.sqrt(variance / number)
    return Estimate(mean, max(mean - half, least), min(mean + half, most))


def t_quantile(freedom: int) -> float:
    """Returns the t with `CONFIDENCE` of Student's distribution between -t and t.

    Args:
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 100.0  # 12.7 at one degree of freedom, less at more
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _between(t: float, freedom: int) -> float:
    """P(-t < T < t) of Student's distribution (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for number in range(2 + odd, freedom - 1, 2):
        term *= (number - 1) / number * cosine**2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
