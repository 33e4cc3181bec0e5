"""Means with 95% intervals, over seeds if there are several and over questions if there is one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; both bounds are None where nothing tells the spread."""

    mean: float
    low: float | None = None
    high: float | None = None

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the difference, with the interval of independent estimates.

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
    """Return the mean over seeds with its t-interval; of one seed, its own estimate.

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


@cache
def t_quantile(freedom: int) -> float:
    """Return the t with `CONFIDENCE` of Student's distribution between -t and t.

    Integrated numerically: T = sqrt(freedom) tan A, where the density of A is proportional to
    cos(A)^(freedom - 1). Right to 8 digits.

    Args:
        freedom: degrees of freedom, 1 or more.
    """
    angles, width = np.linspace(0, np.pi / 2, 100_000, endpoint=False, retstep=True)
    below = np.cumsum(np.cos(angles + width / 2) ** (freedom - 1))
    angle = np.interp(CONFIDENCE * below[-1], below, angles + width)
    return math.sqrt(freedom) * math.tan(angle)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
