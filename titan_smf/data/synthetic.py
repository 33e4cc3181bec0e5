"""A small invented world: facts with many paraphrases and a question each, and text about them.

People, towns, books and companies have invented names; ten relations tie them to answers. *Known*
facts appear in the text, each as several paraphrased statements and most also as questions with
answers. *New* facts are of the same relations and never appear: fact and document streams are there
to teach them later. About a third of the text is prose that mentions none of the names.

The same settings give the same bytes on every platform and Python version: the only source of
chance is `random.Random(str).random()`, whose sequence Python keeps stable.
"""

import random
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from titan_smf.data import synthetic_text as words
from titan_smf.data.documents import Document
from titan_smf.data.facts import Fact as FactRecord
from titan_smf.errors import ConfigError

WORLD_VERSION = 1
RELATIONS = tuple(words.STATEMENTS)
SUBJECTS = {
    "birthplace": "person",
    "trade": "person",
    "teacher": "person",
    "instrument": "person",
    "author": "book",
    "headquarters": "company",
    "product": "company",
    "founder": "company",
    "river": "town",
    "dish": "town",
}

TRAIN_STATEMENTS = 8
FIRST_UNSEEN_STATEMENT = TRAIN_STATEMENTS + 1
"""Paraphrases from this one on are in no text, not even the validation text."""
STREAM_STATEMENTS = 64
"""Statements of a fact and rewrites of a chunk in a stream, as many as the paper's batch has."""
TRAIN_QUESTIONS = 8
QUESTION_SHARE = 0.8
"""Share of the known facts that the text also asks."""
SMALLEST_POPULATION = 20
"""People, towns, books and companies there are at least, so that answers cannot be guessed."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Fact:
    """One fact of the world."""

    id: str
    relation: str
    subject: str
    answer: str
    known: bool
    """The text states it; otherwise it appears nowhere."""
    asked: bool
    """The text also asks it, with its answer."""


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


class World:
    """The world of a seed.

    Args:
        seed: chooses the names, the facts and the text.
        num_facts: known facts, over all relations.
        num_new_facts: facts of the same relations that never appear in the text.
    """

    def __init__(self, seed: int = 0, num_facts: int = 2000, num_new_facts: int = 500) -> None:
        if num_facts < len(RELATIONS) or num_new_facts < 0:
            raise ConfigError(
                "data.sources",
                f"facts={num_facts}, new_facts={num_new_facts}",
                f"at least {len(RELATIONS)} facts and 0 new facts",
            )
        self.seed = seed
        self.num_facts = num_facts
        self.num_new_facts = num_new_facts
        self.facts = self._make_facts()

    def statements(self, fact: Fact, count: int, first: int = 0) -> list[str]:
        """Paraphrases `first` to `first + count` of a fact, all different, in a fixed order.

        The training text of a known fact uses the first `TRAIN_STATEMENTS`, the validation text
        the next one. Neighbouring paraphrases have different patterns.
        """
        draws = Draws(self.seed, "statements", fact.id)
        patterns = list(words.STATEMENTS[fact.relation])
        draws.shuffle(patterns)
        forms_of_pattern = len(set(words.LEAD_INS)) * len(set(words.ENDINGS))
        if first + count > len(patterns) * forms_of_pattern:
            raise ConfigError("statements", count, f"{len(patterns) * forms_of_pattern} at most")
        made: dict[str, None] = {}
        while len(made) < first + count:
            pattern = patterns[len(made) % len(patterns)]
            form = draws.pick(words.LEAD_INS) + pattern + draws.pick(words.ENDINGS) + "."
            made.setdefault(_sentence(form.format(s=fact.subject, a=fact.answer)))
        return list(made)[first:]

    def question(self, fact: Fact, variant: int = 0) -> str:
        """The question whose answer is the fact's, in one of several wordings."""
        patterns = words.QUESTIONS[fact.relation]
        return patterns[variant % len(patterns)].format(s=fact.subject)

    def documents(self, split: str = "train") -> Iterator[str]:
        """The text of the world: `train`, or `validation` with other wordings of the same facts."""
        assert split in ("train", "validation"), "one of the two splits"
        draws = Draws(self.seed, "documents", split)
        sentences: list[str] = []
        answered: list[str] = []
        for fact in self.known_facts:
            if split == "train":
                sentences += self.statements(fact, TRAIN_STATEMENTS)
                variants = list(range(TRAIN_QUESTIONS))
            else:
                sentences += self.statements(fact, 1, first=TRAIN_STATEMENTS)
                variants = [draws.below(TRAIN_QUESTIONS)]
            if fact.asked:
                answered += [f"Q: {self.question(fact, v)}\nA: {fact.answer}" for v in variants]

        documents = ["\n".join(group) for group in _groups(answered, draws)]
        told = sum(map(len, documents)) + sum(map(len, sentences))
        prose = 0
        for group in _groups(sentences, draws):
            between = [_prose(draws) for _ in range(draws.below(4))]
            prose += sum(map(len, between))
            mixed = group + between
            draws.shuffle(mixed)
            documents.append(" ".join(mixed))
        while 2 * prose < told:
            document = " ".join(_prose(draws) for _ in range(4 + draws.below(6)))
            prose += len(document)
            documents.append(document)
        draws.shuffle(documents)
        yield from documents

    @property
    def known_facts(self) -> list[Fact]:
        """The facts that the text states."""
        return [fact for fact in self.facts if fact.known]

    @property
    def new_facts(self) -> list[Fact]:
        """The facts that appear nowhere in the text."""
        return [fact for fact in self.facts if not fact.known]

    def fact_stream(
        self, facts: Iterable[Fact], num_statements: int = STREAM_STATEMENTS, first: int = 0
    ) -> list[FactRecord]:
        """A fact stream of `facts`, each with its paraphrases `first` to `first + num_statements`.

        It is also a question set: every record has a question and its answer.
        """
        return [
            FactRecord(
                id=fact.id,
                statements=tuple(self.statements(fact, num_statements, first)),
                question=self.question(fact),
                answers=(fact.answer,),
            )
            for fact in facts
        ]

    def document_stream(self, num_rewrites: int = STREAM_STATEMENTS) -> list[Document]:
        """A document stream that states every new fact in one chunk of up to seven facts.

        The chunk and each of its rewrites state its facts in other words, in another order, among
        other sentences of prose.
        """
        draws = Draws(self.seed, "document stream")
        documents = []
        for number, facts in enumerate(_groups(self.new_facts, draws)):
            paraphrases = [self.statements(fact, 1 + num_rewrites) for fact in facts]
            texts = []
            for statements in zip(*paraphrases, strict=True):
                sentences = [*statements, *(_prose(draws) for _ in range(1 + draws.below(4)))]
                draws.shuffle(sentences)
                texts.append(" ".join(sentences))
            documents.append(Document(f"chunk-{number:04d}", texts[0], tuple(texts[1:])))
        return documents

    def _make_facts(self) -> list[Fact]:
        total = self.num_facts + self.num_new_facts
        draws = Draws(self.seed, "facts")
        names = _Names(max(SMALLEST_POPULATION, -(-total // len(RELATIONS))), draws)
        order = list(range(total))
        draws.shuffle(order)
        new = set(order[: self.num_new_facts])
        teachers: dict[str, str] = {}
        facts = []
        for number in range(total):
            relation = RELATIONS[number % len(RELATIONS)]
            entity = number // len(RELATIONS)
            subject = names.of_kind[SUBJECTS[relation]][entity]
            answer = names.answer(relation, draws)
            while relation == "teacher" and subject in (answer, teachers.get(answer)):
                answer = names.answer(relation, draws)
            if relation == "teacher":
                teachers[subject] = answer
            known = number not in new
            asked = draws.below(100) < 100 * QUESTION_SHARE and known
            facts.append(Fact(f"{relation}-{entity:04d}", relation, subject, answer, known, asked))
        return facts


class _Names:
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


def _groups(items: list[Item], draws: Draws) -> Iterator[list[Item]]:
    """The items in random order, three to seven at a time."""
    items = list(items)
    draws.shuffle(items)
    start = 0
    while start < len(items):
        size = 3 + draws.below(5)
        yield items[start : start + size]
        start += size


def _prose(draws: Draws) -> str:
    """A sentence that tells no fact."""
    pieces = draws.pick(words.PROSE).split("{")
    text = pieces[0]
    for piece in pieces[1:]:
        slot, _, rest = piece.partition("}")
        text += draws.pick(words.PROSE_WORDS[slot]) + rest
    return _sentence(text + ".")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
