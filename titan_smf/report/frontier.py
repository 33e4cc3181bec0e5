"""Forgetting at matched learning: methods compared where they have learned the same.

A method is run at several rates: the more it learns, the more it forgets. Its frontier gives the
least that it forgets for a given amount of learning (`frontier` in explanations.toml).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

DIGITS = 9
"""Decimals to which two scores must agree to be the same."""


@dataclass(frozen=True)
class Point:
    """The end of a run: the target's score, and what another set's metric lost."""

    learning: float
    forgetting: float


@dataclass(frozen=True)
class Matched:
    """What was forgotten at a level of learning."""

    forgetting: float
    is_bound: bool
    """Whether the level lies below the frontier, so that `forgetting` is an upper bound."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats, by rising learning and so rising forgetting.

    A point is beaten by one with as much learning or more and as little forgetting or less; of
    equal points one stays. Points that are not finite never stay.
    """
    finite = [p for p in points if math.isfinite(p.learning) and math.isfinite(p.forgetting)]
    kept: list[Point] = []
    for point in sorted(finite, key=lambda p: (-_rounded(p.learning), p.forgetting)):
        if not kept or _rounded(point.forgetting) < _rounded(kept[-1].forgetting):
            kept.append(point)
    return kept[::-1]


def at_learning(points: Sequence[Point], level: float) -> Matched | None:
    """Return the least forgetting at a level of learning; None if no point reaches the level."""
    best, level = frontier(points), _rounded(level)
    learned = [_rounded(point.learning) for point in best]
    if not best or learned[-1] < level:
        return None
    if level <= learned[0]:
        return Matched(best[0].forgetting, is_bound=level < learned[0])
    after = next(index for index, value in enumerate(learned) if value >= level)
    left, right = best[after - 1], best[after]
    share = (level - learned[after - 1]) / (learned[after] - learned[after - 1])
    return Matched(left.forgetting + share * (right.forgetting - left.forgetting), is_bound=False)


def _rounded(value: float) -> float:
    """Drop the last digits: means of the same scores, added in another order, differ there."""
    return round(value, DIGITS)
