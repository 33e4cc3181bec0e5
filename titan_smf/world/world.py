"""A small invented world: facts with many paraphrases and a question each, and text about them.

People, towns, books and companies have invented names; ten relations tie them to answers.

    known facts    the text states them in several paraphrases, and asks most of them with answers
    new facts      of the same relations, in no text: streams are there to teach them later
    tuning facts   also in no text: hyperparameters are chosen on them, results never reported

Forgetting is measured on known facts that the text asks: on all of them, on those *near* the new
facts (the same relation, subjects with similar names) and on those *far* from any. About a third of
the text is prose that mentions none of the names.

The same settings give the same bytes on every platform and Python version: the only source of
chance is `random.Random(str).random()`, whose sequence Python keeps stable.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from titan_smf.errors import ConfigError
from titan_smf.world.names import Draws, Item, Names, nearest
from titan_smf.world.words import RELATIONS, WORDS

WORLD_VERSION = 3

TRAIN_STATEMENTS = 24
"""Statements of a known fact in the text. With 8, a model of ten million parameters learned the
text by heart: its loss on other text rose."""
FIRST_UNSEEN_STATEMENT = TRAIN_STATEMENTS + 1
"""Paraphrases from this one on appear in no text, not even the validation text."""
STREAM_STATEMENTS = 64
"""Statements of a fact and rewrites of a chunk in a stream, as many as the paper's batch has."""
TRAIN_QUESTIONS = 24
"""Times that the text asks a fact, cycling through the wordings of its question."""
QUESTION_SHARE = 0.8
"""Share of the known facts that the text also asks."""
FACT_SETS = ("new_facts", "tuning_facts", "known_facts", "near_facts", "far_facts", "other_facts")
"""Names of the sets of facts that streams and question sets are made of; see `World.fact_set`."""
SMALLEST_POPULATION = 20
"""Least number of people, towns, books and companies, so that answers cannot be guessed."""

Role = Literal["known", "new", "tuning"]


@dataclass(frozen=True)
class Fact:
    """One fact of the world."""

    id: str
    relation: str
    subject: str
    answer: str
    role: Role
    """The text states known facts; it never mentions the others."""
    asked: bool
    """Whether the text also asks it, with its answer; known facts only."""


class World:
    """An invented world, made from its seed and sizes alone.

    Args:
        seed: chooses the names, the facts and the text.
        num_facts: known facts, over all relations.
        num_new_facts: facts of the same relations that never appear in the text.
        num_tuning_facts: more such facts, to choose hyperparameters on.
    """

    def __init__(
        self,
        seed: int = 0,
        num_facts: int = 2000,
        num_new_facts: int = 500,
        num_tuning_facts: int = 0,
    ) -> None:
        if num_facts < len(RELATIONS) or min(num_new_facts, num_tuning_facts) < 0:
            raise ConfigError(
                "data.sources",
                f"facts={num_facts}, new_facts={num_new_facts}, tuning_facts={num_tuning_facts}",
                f"at least {len(RELATIONS)} facts and 0 new facts and tuning facts",
            )
        self.seed = seed
        self.num_facts = num_facts
        self.num_new_facts = num_new_facts
        self.num_tuning_facts = num_tuning_facts
        self.facts = self._make_facts()
        self.known_facts = [fact for fact in self.facts if fact.role == "known"]
        """The facts that the text states."""
        self.new_facts = [fact for fact in self.facts if fact.role == "new"]
        """The facts for finetuning to teach, which appear nowhere in the text."""
        self.tuning_facts = [fact for fact in self.facts if fact.role == "tuning"]
        """Other facts that appear nowhere in the text, to choose hyperparameters on."""

    def statements(self, fact: Fact, count: int, first: int = 0) -> list[str]:
        """Return paraphrases `first` to `first + count` of a fact, all different, in a fixed order.

        The training text of a known fact uses the first `TRAIN_STATEMENTS`, the validation text
        the next one. Neighbouring paraphrases have different patterns.
        """
        draws = Draws(self.seed, "statements", fact.id)
        patterns = list(WORDS["relations"][fact.relation]["statements"])
        draws.shuffle(patterns)
        lead_ins, endings = WORDS["lead_ins"], WORDS["endings"]
        most = len(patterns) * len(set(lead_ins)) * len(set(endings))
        if first + count > most:
            raise ConfigError("statements", count, f"{most} at most")
        made: dict[str, None] = {}
        while len(made) < first + count:
            pattern = patterns[len(made) % len(patterns)]
            template = draws.pick(lead_ins) + pattern + draws.pick(endings) + "."
            made.setdefault(_sentence(template.format(s=fact.subject, a=fact.answer)))
        return list(made)[first:]

    def question(self, fact: Fact, variant: int = 0) -> str:
        """Return the question that the fact answers, in one of several wordings."""
        patterns = WORDS["relations"][fact.relation]["questions"]
        return patterns[variant % len(patterns)].format(s=fact.subject)

    def documents(self, split: str = "train") -> Iterator[str]:
        """Yield the text of the world.

        Args:
            split: `train`, or `validation`, which states the same facts in other wordings.
        """
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

    @cached_property
    def asked_facts(self) -> list[Fact]:
        """The known facts that the text also asks, in random order: any part is a fair sample."""
        facts = [fact for fact in self.facts if fact.asked]
        Draws(self.seed, "asked facts").shuffle(facts)
        return facts

    def fact_set(self, name: str) -> list[Fact]:
        """Return the facts of one of `FACT_SETS`, in the order of streams and question files.

        `known_facts` are the asked ones, near, far and other facts parts of them. Of each relation
        as many are near and as many far as it has new facts, but at most half of them are near.
        Facts are alike where their subjects have similar names (`names.similarity`).
        """
        if name == "known_facts":
            return list(self.asked_facts)
        if name in ("new_facts", "tuning_facts"):
            return list(getattr(self, name))
        return list(self._by_similarity[name])

    @cached_property
    def _by_similarity(self) -> dict[str, list[Fact]]:
        """The asked facts most and least like new ones, of the relation and of all; the others."""
        near: list[Fact] = []
        far: list[Fact] = []
        all_new = {fact.subject for fact in self.new_facts}
        for relation in RELATIONS:
            new = {fact.subject for fact in self.new_facts if fact.relation == relation}
            asked = [fact for fact in self.asked_facts if fact.relation == relation]
            count = min(len(new), len(asked) // 2)
            asked.sort(key=lambda fact: -nearest(fact.subject, new))
            near += asked[:count]
            far += sorted(asked[count:], key=lambda fact: nearest(fact.subject, all_new))[:count]
        apart = {*near, *far}
        other = [fact for fact in self.asked_facts if fact not in apart]
        return {"near_facts": near, "far_facts": far, "other_facts": other}

    def chunks(self, num_rewrites: int = STREAM_STATEMENTS) -> list[list[str]]:
        """Return groups of texts that together state every new fact, up to seven facts a group.

        A group is a chunk and then its rewrites: each states the same facts in other words, in
        another order, among other sentences of prose.
        """
        draws = Draws(self.seed, "document stream")
        chunks = []
        for facts in _groups(self.new_facts, draws):
            paraphrases = [self.statements(fact, 1 + num_rewrites) for fact in facts]
            texts = []
            for statements in zip(*paraphrases, strict=True):
                sentences = [*statements, *(_prose(draws) for _ in range(1 + draws.below(4)))]
                draws.shuffle(sentences)
                texts.append(" ".join(sentences))
            chunks.append(texts)
        return chunks

    def _make_facts(self) -> list[Fact]:
        total = self.num_facts + self.num_new_facts + self.num_tuning_facts
        draws = Draws(self.seed, "facts")
        names = Names(max(SMALLEST_POPULATION, -(-total // len(RELATIONS))), draws)
        order = _evenly_over_relations(total, draws)
        new = set(order[: self.num_new_facts])
        tuning = set(order[self.num_new_facts : self.num_new_facts + self.num_tuning_facts])
        teachers: dict[str, str] = {}
        facts = []
        for number in range(total):
            relation = RELATIONS[number % len(RELATIONS)]
            entity = number // len(RELATIONS)
            subject = names.of_kind[WORDS["relations"][relation]["subject"]][entity]
            answer = names.answer(relation, draws)
            while relation == "teacher" and subject in (answer, teachers.get(answer)):
                answer = names.answer(relation, draws)
            if relation == "teacher":
                teachers[subject] = answer
            role: Role = "new" if number in new else "tuning" if number in tuning else "known"
            asked = draws.below(100) < 100 * QUESTION_SHARE and role == "known"
            facts.append(Fact(f"{relation}-{entity:04d}", relation, subject, answer, role, asked))
        return facts


def _evenly_over_relations(total: int, draws: Draws) -> list[int]:
    """Return the numbers of all facts in random order, taking turns among the relations."""
    place: dict[int, int] = {}
    for relation in range(len(RELATIONS)):
        numbers = list(range(relation, total, len(RELATIONS)))
        draws.shuffle(numbers)
        place |= {number: index for index, number in enumerate(numbers)}
    return sorted(range(total), key=lambda number: (place[number], number % len(RELATIONS)))


def _groups(items: list[Item], draws: Draws) -> Iterator[list[Item]]:
    """Yield the items in random order, three to seven at a time."""
    items = list(items)
    draws.shuffle(items)
    start = 0
    while start < len(items):
        size = 3 + draws.below(5)
        yield items[start : start + size]
        start += size


def _prose(draws: Draws) -> str:
    """Return a sentence that states no fact."""
    pieces = draws.pick(WORDS["prose"]["sentences"]).split("{")
    text = pieces[0]
    for piece in pieces[1:]:
        slot, _, rest = piece.partition("}")
        text += draws.pick(WORDS["prose"]["words"][slot]) + rest
    return _sentence(text + ".")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
