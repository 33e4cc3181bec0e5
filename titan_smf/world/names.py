"""The names of the synthetic world: how they are made up, and how alike two of them are."""

import functools
import random
from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any, TypeVar

from titan_smf.world import text as words

Item = TypeVar("Item")


class Draws:
    """Random choices that stay the same across Python versions."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, limit: int) -> int:
        return int(self._random() * limit)

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def shuffle(self, items: MutableSequence[Any]) -> None:
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]


class Names:
    """The names of a world: no invented word serves two things, given names apart."""

    def __init__(self, count: int, draws: Draws) -> None:
        self._used: set[str] = set()
        self._draws = draws
        given = [self._word(2) for _ in range(100)]
        self._rivers = [self._word(2) for _ in range(count)]
        self.of_kind = {
            "person": [f"{draws.pick(given)} {self._word(2)}" for _ in range(count)],
            "town": [self._word(3) for _ in range(count)],
            "company": [
                draws.pick(words.COMPANY_FORMS).format(self._word(2)) for _ in range(count)
            ],
            "book": self._titles(count),
        }

    def answer(self, relation: str, draws: Draws) -> str:
        if relation in ("teacher", "author", "founder"):
            return draws.pick(self.of_kind["person"])
        if relation in ("birthplace", "headquarters"):
            return draws.pick(self.of_kind["town"])
        if relation == "product":
            return f"{draws.pick(words.PRODUCT_STYLES)} {draws.pick(words.PRODUCT_GOODS)}"
        if relation == "dish":
            parts = (words.DISH_STYLES, words.DISH_FOODS, words.DISH_FORMS)
            return " ".join(draws.pick(part) for part in parts)
        pools = {"trade": words.TRADES, "instrument": words.INSTRUMENTS, "river": self._rivers}
        return draws.pick(pools[relation])

    def _word(self, syllables: int) -> str:
        """A new word of that many syllables, or one more where those run out."""
        tries = 0
        while True:
            length = syllables + tries // 50
            word = "".join(self._draws.pick(words.SYLLABLES) for _ in range(length)).capitalize()
            if word not in self._used:
                self._used.add(word)
                return word
            tries += 1

    def _titles(self, count: int) -> list[str]:
        titles: dict[str, None] = {}
        while len(titles) < count:
            form = self._draws.pick(words.BOOK_FORMS)
            style, thing = self._draws.pick(words.BOOK_STYLES), self._draws.pick(words.BOOK_THINGS)
            place = self._word(2) if "{place}" in form else ""
            titles.setdefault(form.format(style=style, thing=thing, place=place))
        return list(titles)


def similarity(one: str, other: str) -> float:
    """How alike two names are, 0 to 1: pairs of neighbouring letters in both over those in either.

    Names that share a given name, a word or syllables share letter pairs. Case does not matter.
    """
    first, second = _letter_pairs(one), _letter_pairs(other)
    shared = len(first & second)
    return shared / max(1, len(first) + len(second) - shared)


@functools.lru_cache(1 << 16)  # each name is compared with many
def _letter_pairs(name: str) -> frozenset[str]:
    words_of_name = name.lower().split()
    return frozenset(word[i : i + 2] for word in words_of_name for i in range(len(word) - 1))


def nearest(name: str, others: Iterable[str]) -> float:
    """Similarity of `name` to the one of `others` that is most like it."""
    return max((similarity(name, other) for other in others), default=0.0)
