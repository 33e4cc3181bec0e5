"""The synthetic world is the same everywhere, rich enough, and keeps its new facts secret."""

import hashlib
import itertools
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from titan_smf.data import synthetic_text as words
from titan_smf.data.synthetic import RELATIONS, TRAIN_STATEMENTS, World
from titan_smf.data.tokenizer import load_tokenizer, train_rank_file
from titan_smf.errors import ConfigError

TINY_SHA256 = "4af8ea3606256d94be0ddf59bb73e6d7fd81a44c835aebfedf01afbf17294e32"
"""Of the tiny world below. It changes only together with `WORLD_VERSION`."""


def text_hash(world: World) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        for document in world.documents(split):
            digest.update(document.encode() + b"\0")
    for fact in world.facts:
        digest.update(repr(fact).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def documents(world: World) -> dict[str, list[str]]:
    return {split: list(world.documents(split)) for split in ("train", "validation")}


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert text_hash(World(seed=7, num_facts=40, num_new_facts=10)) == TINY_SHA256
    assert text_hash(World(seed=8, num_facts=40, num_new_facts=10)) != TINY_SHA256
    script = (
        "from tests.test_synthetic import *;"
        "print(text_hash(World(seed=7, num_facts=40, num_new_facts=10)))"
    )
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode().strip() == TINY_SHA256


def test_there_are_thousands_of_facts_of_ten_relations(world: World) -> None:
    known = [fact for fact in world.facts if fact.known]
    assert len(known) == 2000
    assert len(world.facts) == 2500
    assert len(RELATIONS) == 10
    for counts in (
        Counter(fact.relation for fact in known),
        Counter(fact.relation for fact in world.facts if not fact.known),
    ):
        assert set(counts) == set(RELATIONS)
        assert max(counts.values()) < 2 * min(counts.values())
    asked = sum(fact.asked for fact in known)
    assert 0.75 < asked / len(known) < 0.85
    assert len({fact.id for fact in world.facts}) == len(world.facts)


def test_a_question_has_one_answer_that_cannot_be_guessed(world: World) -> None:
    assert len({(fact.relation, fact.subject) for fact in world.facts}) == len(world.facts)
    questions = Counter(
        world.question(fact, variant) for fact in world.facts for variant in range(5)
    )
    assert max(questions.values()) == 1
    for relation in RELATIONS:
        answers = Counter(fact.answer for fact in world.facts if fact.relation == relation)
        assert answers.most_common(1)[0][1] <= 0.1 * answers.total()
        assert len(answers) >= 25


def test_patterns_are_many_and_name_subject_and_answer() -> None:
    fields = string.Formatter().parse
    for relation in RELATIONS:
        patterns = words.STATEMENTS[relation]
        assert len(set(patterns)) >= 20
        for pattern in patterns:
            assert sorted(name for _, name, _, _ in fields(pattern) if name) == ["a", "s"]
            assert not pattern.endswith(".")
            assert pattern[0].islower() or pattern.startswith(("{s}", "{a}"))
        assert len(set(words.QUESTIONS[relation])) >= 4
        for pattern in words.QUESTIONS[relation]:
            assert [name for _, name, _, _ in fields(pattern) if name] == ["s"]
    slots = {name for text in words.PROSE for _, name, _, _ in fields(text) if name}
    assert slots == set(words.PROSE_WORDS)


def test_paraphrases_are_hundreds_all_different_and_stable(world: World) -> None:
    for fact in world.facts[:10]:
        many = world.statements(fact, 400)
        assert len(set(many)) == 400
        assert all(fact.subject.lower() in text.lower() for text in many)
        assert all(fact.answer.lower() in text.lower() for text in many)
        assert all(text[0].isupper() and text.endswith(".") for text in many)
        assert world.statements(fact, 5) == many[:5]
        assert world.statements(fact, 5, first=20) == many[20:25]
        plain = [text for text in many[:16] if fact.subject in text]
        assert len(plain) >= 10
    with pytest.raises(ConfigError, match=r"statements: got 10000; allowed: [0-9]+ at most"):
        world.statements(world.facts[0], 10_000)


def sentences(texts: list[str]) -> list[str]:
    return [part for text in texts for part in re.split(r"(?<=[.?])\s|\n(?=Q:)", text)]


def test_new_facts_never_appear(world: World, documents: dict[str, list[str]]) -> None:
    of_subject: dict[str, list[str]] = {fact.subject.lower(): [] for fact in world.facts}
    longest = max(name.count(" ") for name in of_subject) + 1
    for text in sentences(documents["train"] + documents["validation"]):
        tokens = re.findall(r"\w+|[^\w\s]", text.lower())
        spaced = " ".join(["", *tokens, ""])
        for first, length in itertools.product(range(len(tokens)), range(1, longest + 1)):
            if (name := " ".join(tokens[first : first + length])) in of_subject:
                of_subject[name].append(spaced)
    for fact in world.facts:
        texts = of_subject[fact.subject.lower()]
        stated = sum(f" {fact.answer.lower()} " in text for text in texts)
        assert stated >= TRAIN_STATEMENTS if fact.known else stated == 0


def test_known_facts_are_stated_and_asked(world: World, documents: dict[str, list[str]]) -> None:
    train, validation = "\n".join(documents["train"]), "\n".join(documents["validation"])
    for fact in world.facts[:300]:
        if fact.known:
            statements = world.statements(fact, TRAIN_STATEMENTS + 1)
            assert all(statement in train for statement in statements[:-1])
            assert statements[-1] in validation
            assert statements[-1] not in train
        assert (f"Q: {world.question(fact)}\nA: {fact.answer}" in train) == fact.asked
        if not fact.asked:
            assert world.question(fact) not in train


def test_a_third_of_the_text_is_prose_without_names(
    world: World, documents: dict[str, list[str]]
) -> None:
    names = {fact.subject for fact in world.facts}
    characters: Counter[bool] = Counter()
    for text in sentences(documents["train"])[:10_000]:
        without_names = not any(name in text for name in names)
        characters[without_names and not text.startswith("Q:")] += len(text)
    share = characters[True] / characters.total()
    assert 0.25 < share < 0.42


def test_the_default_world_has_a_few_megabytes_and_no_document_twice(
    documents: dict[str, list[str]],
) -> None:
    size = sum(len(text.encode()) for text in documents["train"])
    assert 2_000_000 < size < 4_000_000
    assert len(documents["validation"]) > 500
    assert set(documents["train"]).isdisjoint(documents["validation"])
    assert len(set(documents["train"])) == len(documents["train"])


def test_names_take_a_few_tokens(
    world: World, documents: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = str(tmp_path_factory.mktemp("ranks") / "world.tiktoken")
    tokenizer = train_rank_file(documents["train"], 1024, path)
    lengths = sorted(len(tokenizer.encode(" " + fact.answer)) for fact in world.facts)
    assert lengths[len(lengths) // 2] <= 4
    assert lengths[-1] <= 12
    text = "\n\n".join(documents["train"][:500])
    assert len(tokenizer.encode(text)) < len(load_tokenizer("bytes").encode(text)) / 3


def test_worlds_of_any_size_can_be_made() -> None:
    for num_facts, num_new_facts in ((10, 0), (11, 3), (30_000, 100)):
        facts = World(1, num_facts, num_new_facts).facts
        assert sum(fact.known for fact in facts) == num_facts
        assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts)
    with pytest.raises(ConfigError, match="at least 10 facts"):
        World(1, 9)
