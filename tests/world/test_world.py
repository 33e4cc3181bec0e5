"""The invented world is the same everywhere, rich enough, and keeps its new facts secret."""

import hashlib
import itertools
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from titan_smf.commands import make_world
from titan_smf.commands.entry import exit_code
from titan_smf.data.tokenizer import load_tokenizer, train_rank_file
from titan_smf.errors import ConfigError
from titan_smf.streams.records import Document, Fact, document_stream, fact_stream, read_records
from titan_smf.world.names import nearest, similarity
from titan_smf.world.words import RELATIONS, WORDS
from titan_smf.world.world import FACT_SETS, STREAM_STATEMENTS, TRAIN_STATEMENTS, World

ROOT = Path(__file__).parents[2]
TINY_SHA256 = "8373acb25b64bb6a3e6da539169bd79fba0b203a699d24f4bcd90c08c1c225b3"
"""Of the tiny world below. It changes only together with `WORLD_VERSION`."""

STREAMS_SHA256 = "d5d83d41033062a7f5ca616ff5042f5a141f9aba9769ef730c71a0e13cc572a0"
"""Of the files that make_world writes of that world; changes as seldom."""


def text_hash(world: World) -> str:
    texts = [text + "\0" for split in ("train", "validation") for text in world.documents(split)]
    return hashlib.sha256("".join([*texts, *map(repr, world.facts)]).encode()).hexdigest()


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0, num_facts=1000, num_new_facts=200, num_tuning_facts=100)


@pytest.fixture(scope="module")
def documents(world: World) -> dict[str, list[str]]:
    return {split: list(world.documents(split)) for split in ("train", "validation")}


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert text_hash(World(7, 40, 10, 5)) == TINY_SHA256
    assert text_hash(World(8, 40, 10, 5)) != TINY_SHA256
    script = "from tests.world.test_world import *; print(text_hash(World(7, 40, 10, 5)))"
    command = [sys.executable, "-c", script]
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        printed = subprocess.check_output(command, env=environment, cwd=ROOT, text=True)
        assert printed.strip() == TINY_SHA256


def test_facts_of_each_kind_are_spread_evenly_over_ten_relations(world: World) -> None:
    kinds = (world.known_facts, world.new_facts, world.tuning_facts)
    assert [*map(len, kinds), len(world.facts), len(RELATIONS)] == [1000, 200, 100, 1300, 10]
    for facts in kinds:
        counts = Counter(fact.relation for fact in facts)
        assert set(counts) == set(RELATIONS)
        assert max(counts.values()) <= min(counts.values()) + 1
    assert 0.75 < sum(fact.asked for fact in world.known_facts) / 1000 < 0.85
    assert len({fact.id for fact in world.facts}) == len(world.facts)


def test_a_question_has_one_answer_that_cannot_be_guessed(world: World) -> None:
    assert len({(fact.relation, fact.subject) for fact in world.facts}) == len(world.facts)
    questions = [world.question(fact, variant) for fact in world.facts for variant in range(5)]
    assert len(set(questions)) == len(questions)
    for relation in RELATIONS:
        answers = Counter(fact.answer for fact in world.facts if fact.relation == relation)
        assert answers.most_common(1)[0][1] <= 0.1 * answers.total()
        assert len(answers) >= 25


def test_patterns_are_many_and_name_subject_and_answer() -> None:
    def fields(pattern: str) -> list[str]:
        return sorted(name for _, name, _, _ in string.Formatter().parse(pattern) if name)

    for relation in WORDS["relations"].values():
        assert len(set(relation["statements"])) >= 20
        for pattern in relation["statements"]:
            assert fields(pattern) == ["a", "s"]
            assert not pattern.endswith(".")
            assert pattern[0].islower() or pattern.startswith(("{s}", "{a}"))
        assert len(set(relation["questions"])) >= 4
        assert all(fields(pattern) == ["s"] for pattern in relation["questions"])
    slots = {slot for sentence in WORDS["prose"]["sentences"] for slot in fields(sentence)}
    assert slots == set(WORDS["prose"]["words"])


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
        for first, length in itertools.product(range(len(tokens)), range(1, longest + 1)):
            if (name := " ".join(tokens[first : first + length])) in of_subject:
                of_subject[name].append(" ".join(["", *tokens, ""]))
    for fact in world.facts:
        texts = of_subject[fact.subject.lower()]
        stated = sum(f" {fact.answer.lower()} " in text for text in texts)
        assert stated >= TRAIN_STATEMENTS if fact.role == "known" else stated == 0


def test_known_facts_are_stated_and_asked(world: World, documents: dict[str, list[str]]) -> None:
    train, validation = "\n".join(documents["train"]), "\n".join(documents["validation"])
    told = set(sentences(documents["train"]))
    for fact in world.facts[:300]:
        if fact.role == "known":
            statements = world.statements(fact, TRAIN_STATEMENTS + 1)
            assert all(statement in train for statement in statements[:-1])
            assert statements[-1] in validation
            assert statements[-1] not in told
        assert (f"Q: {world.question(fact)}\nA: {fact.answer}" in train) == fact.asked
        if not fact.asked:
            assert world.question(fact) not in train


def test_a_third_of_the_text_is_prose_without_names(
    world: World, documents: dict[str, list[str]]
) -> None:
    names = {fact.subject for fact in world.facts}
    characters: Counter[bool] = Counter()
    for text in sentences(documents["train"])[:10_000]:
        has_name = any(name in text for name in names)
        characters[has_name or text.startswith("Q:")] += len(text)
    assert 0.25 < characters[False] / characters.total() < 0.42


def test_the_text_has_four_kilobytes_a_fact_and_no_document_twice(
    documents: dict[str, list[str]],
) -> None:
    size = sum(len(text.encode()) for text in documents["train"])
    assert 3_000 < size / 1000 < 5_000
    assert len(documents["validation"]) > 250
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
        assert sum(fact.role == "known" for fact in facts) == num_facts
        assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts)
    with pytest.raises(ConfigError, match="at least 10 facts"):
        World(1, 9)


def test_make_world_writes_the_same_bytes_and_streams_that_can_be_read(tmp_path: Path) -> None:
    sizes = "--seed 7 --facts 40 --new-facts 10 --tuning-facts 5 --statements 12"
    command = [sys.executable, str(ROOT / "tools/make_world.py"), str(tmp_path), *sizes.split()]
    printed = subprocess.check_output(command, text=True, timeout=60)
    names = ["train", "validation", "documents", *FACT_SETS]
    paths = [tmp_path / f"{name}.jsonl" for name in names]
    assert [line.split(": ")[0] for line in printed.splitlines()] == list(map(str, paths))
    assert "new_facts.jsonl: 10 facts, " in printed
    contents = [path.read_bytes() for path in paths]
    assert hashlib.sha256(b"\0".join(contents)).hexdigest() == STREAMS_SHA256

    world = World(7, 40, 10, 5)
    for name in FACT_SETS:
        records = read_records(str(tmp_path / f"{name}.jsonl"), Fact)
        assert records == fact_stream(world, world.fact_set(name), 12)
        assert all(len(record.statements) == 12 for record in records)
    documents = read_records(str(tmp_path / "documents.jsonl"), Document)
    assert documents == document_stream(world, 12)
    train = [json.loads(line)["text"] for line in contents[0].splitlines()]
    assert train == list(world.documents())


def test_make_world_names_settings_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value, message in [
        ("--statements", "0", "--statements: got 0; allowed: 1 or more"),
        ("--statements", "10000", "statements: got 1000"),
        ("--facts", "3", "at least 10 facts"),
        ("--new-facts", "-1", "at least 10 facts and 0 new facts"),
        ("--tuning-facts", "-1", "and 0 new facts and tuning facts"),
    ]:
        assert exit_code(make_world.main, [str(tmp_path / "out"), option, value]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert not (tmp_path / "out").exists()


def test_streams_teach_new_facts_and_ask_known_ones(
    world: World, documents: dict[str, list[str]]
) -> None:
    """No stream shares a sentence with the text, which states what is called known, no more."""
    text = "\n".join(documents["train"])
    told = set(sentences(documents["train"] + documents["validation"]))
    unknown = world.new_facts + world.tuning_facts
    known, new = fact_stream(world, world.known_facts), fact_stream(world, unknown)
    assert [len(known), len(new)] == [1000, 300]
    for record in [*known, *new]:
        assert len(set(record.statements)) == STREAM_STATEMENTS
        assert told.isdisjoint(record.statements)
        (answer,) = record.answers
        assert all(answer.lower() in statement.lower() for statement in record.statements)
    for fact, record in zip(world.known_facts, known, strict=True):
        assert world.statements(fact, 1)[0] in text
        assert (record.question in text) == fact.asked
    assert [record.id for record in new] == [fact.id for fact in unknown]
    assert not any(world.question(fact, v) in text for fact in unknown for v in range(5))


def test_similar_names_share_given_names_words_or_syllables() -> None:
    assert similarity("Kator Belen", "Kator Belen") == 1
    assert similarity("Kator Belen", "kator belen") == 1
    assert similarity("Kator Belen", "Vusif Wodri") == 0
    given, syllable = (similarity("Kator Belen", other) for other in ("Kator Mufi", "Wubel Mufi"))
    assert given > syllable > 0
    assert similarity("Ab Cd", "Abcd") == 2 / 3


def test_near_facts_are_more_like_new_ones_than_others_and_far_facts_less(world: World) -> None:
    near, far, known = map(world.fact_set, ("near_facts", "far_facts", "known_facts"))
    assert set(known) == {fact for fact in world.facts if fact.asked}
    assert known != [fact for fact in world.facts if fact.asked], "in random order"
    assert set(near) | set(far) <= set(known)
    assert set(near).isdisjoint(far)
    new_of = Counter(fact.relation for fact in world.new_facts)
    assert all(Counter(fact.relation for fact in facts) == new_of for facts in (near, far))

    all_new = {fact.subject for fact in world.new_facts}
    for relation in RELATIONS:
        new = {fact.subject for fact in world.new_facts if fact.relation == relation}
        others = [fact for fact in known if fact.relation == relation and fact not in near]
        least = min(nearest(fact.subject, new) for fact in near if fact.relation == relation)
        assert least >= max(nearest(fact.subject, new) for fact in others)
        others = [fact for fact in others if fact not in far]
        most = max(nearest(fact.subject, all_new) for fact in far if fact.relation == relation)
        assert most <= min(nearest(fact.subject, all_new) for fact in others)

    near, far, known = map(World(0, 20, 10).fact_set, ("near_facts", "far_facts", "known_facts"))
    assert 0 < len(near) == len(far) <= len(known) / 2
    assert World(0, 20, 0).fact_set("near_facts") == World(0, 20, 0).fact_set("far_facts") == []


def test_each_rewrite_states_all_new_facts_of_its_chunk(world: World) -> None:
    left = {fact.id: fact for fact in world.new_facts}
    for document in document_stream(world, 20):
        assert len(document.rewrites) == 20
        texts = [document.chunk, *document.rewrites]
        stated = [fact for fact in left.values() if world.statements(fact, 1)[0] in document.chunk]
        assert 1 <= len(stated) <= 7
        orders = set()
        paraphrases = [world.statements(left.pop(fact.id), 21) for fact in stated]
        for text, statements in zip(texts, zip(*paraphrases, strict=True), strict=True):
            assert all(statement in text for statement in statements)
            places = [text.index(statement) for statement in statements]
            orders.add(tuple(sorted(range(len(places)), key=places.__getitem__)))
        assert len(orders) > 1 or len(stated) == 1, "the facts come in other orders"
        assert len(sentences(texts)) >= 21 * (len(stated) + 1), "among sentences of prose"
    assert not left, "every new fact is in a chunk"
