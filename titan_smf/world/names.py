"""Names of the invented world: how they are made up, and how similar two of them are."""

import functools
import random
from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any, TypeVar

from titan_smf.world.words import WORDS

Item = TypeVar("Item")


class Draws:
    """Random choices, seeded by `key`, that stay the same across Python versions."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, limit: int) -> int:
        """Return an integer from 0 to `limit - 1`."""
        return int(self._random() * limit)

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def shuffle(self, items: MutableSequence[Any]) -> None:
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]


class Names:
    """The names of a world, by kind; only given names are shared between two of them."""

    def __init__(self, count: int, draws: Draws) -> None:
        self._used: set[str] = set()
        self._draws = draws
        given = [self._word(2) for _ in range(100)]
        self.of_kind = {
            "river": [self._word(2) for _ in range(count)],
            "person": [f"{draws.pick(given)} {self._word(2)}" for _ in range(count)],
            "town": [self._word(3) for _ in range(count)],
            "company": [
                draws.pick(WORDS["company_names"]).format(self._word(2)) for _ in range(count)
            ],
            "book": self._titles(count),
        }

    def answer(self, relation: str, draws: Draws) -> str:
        """Draw an answer for a relation: a name of this world, or common words."""
        kind = WORDS["relations"][relation]["answer"]
        if kind in self.of_kind:
            return draws.pick(self.of_kind[kind])
        return " ".join(draws.pick(choices) for choices in WORDS["answers"][kind])

    def _word(self, syllables: int) -> str:
        """Make up a new word of so many syllables, of more where those run out."""
        tries = 0
        while True:
            length = syllables + tries // 50
            word = "".join(self._draws.pick(WORDS["syllables"]) for _ in range(length)).capitalize()
            if word not in self._used:
                self._used.add(word)
                return word
            tries += 1

    def _titles(self, count: int) -> list[str]:
        books = WORDS["books"]
        titles: dict[str, None] = {}
        while len(titles) < count:
            title = self._draws.pick(books["titles"])
            style, thing = self._draws.pick(books["styles"]), self._draws.pick(books["things"])
            place = self._word(2) if "{place}" in title else ""
            titles.setdefault(title.format(style=style, thing=thing, place=place))
        return list(titles)


def similarity(one: str, other: str) -> float:
    """Return how similar two names are, from 0 to 1: the Jaccard index of their letter bigrams.

    Bigrams lie within words; case does not matter.
    """
    first, second = _bigrams(one), _bigrams(other)
    shared = len(first & second)
    return shared / max(1, len(first) + len(second) - shared)


@functools.lru_cache(1 << 16)  # each name is compared with many
def _bigrams(name: str) -> frozenset[str]:
    words = name.lower().split()
    return frozenset(word[i : i + 2] for word in words for i in range(len(word) - 1))


def nearest(name: str, others: Iterable[str]) -> float:
    """Return the similarity of `name` to the most similar of `others`; 0 without others."""
    return max((similarity(name, other) for other in others), default=0.0)
