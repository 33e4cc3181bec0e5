"""Streams made without a model: statements right and different, chunks that lose nothing, parts."""

import collections
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.streams.conftest import TOOL, ToolRun
from titan_smf.data.raw_text import TextOptions
from titan_smf.errors import ConfigError, DataError
from titan_smf.streams.chunks import split_chunks, split_sentences
from titan_smf.streams.making import (
    StreamOptions,
    Subset,
    make_documents,
    make_facts,
    text_of_facts,
    write_lines,
)
from titan_smf.streams.paraphrases import (
    declarative_sentences,
    pattern_rewrites,
    pattern_statements,
)
from titan_smf.streams.records import Document, Fact, read_records
from titan_smf.streams.rewriting import mentions
from titan_smf.world.names import Draws

TEXT = """\
The harbour of Brel was dug by Dr. A. B. Stone in 1871. It cost 3.5 million crowns! "Too much,"
said the mayor. "Far too much." Was it? Nobody knows.

= The lighthouse =
It stands on the U.S. side, e.g. near the pier. It burns oil... and its lamp turns.
"""


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"who wrote book {n}", "answer": [f"Anna {n}", "A."]} for n in range(400)]
    write_lines(str(path), rows)
    return str(path)


DECLARATIVES = {
    "who wrote emma": "X wrote emma",
    "Who received the IEEE Award in 2010?": "X received the IEEE Award in 2010",
    "who plays wordsworth's sister in the film": "X plays wordsworth's sister in the film",
    "who has won the most oscars": "X has won the most oscars",
    "who is the president of zambia": "X is the president of zambia",
    "who's the captain of the team": "X is the captain of the team",
    "what is the capital of peru?": "the capital of peru is X",
    "what was the name of the ship": "the name of the ship was X",
    "what is a young goat called": "a young goat is called X",
    "where was the film made in 1998": "the place where the film was made in 1998 is X",
    "where is the hall of fame located": "the place where the hall of fame is located is X",
    "when was the last time it rained": "the last time it rained was X",
    "when was the king born": "the time when the king was born is X",
    "when is the new season coming out": "the time when the new season is coming out is X",
    "how many hospitals are there in the us": "the number of hospitals in the us is X",
    # no plain sentence, or none that a rule can find
    "who is anna married to": None,
    "who was the queen married to": None,
    "who did the voice of the fish": None,
    "who has england been at war with": None,
    "who were the first people in space": None,
    "who is the man talking": None,
    "what is the song about": None,
    "what is the film based on": None,
    "what are the toll roads called in mexico": None,
    "where was the cup held and who won": None,
    "when did the war end": None,
    "baseball teams who have not won": None,
    "how many goals did he score": None,
}


@pytest.mark.parametrize("question", DECLARATIVES)
def test_questions_become_sentences_only_by_a_rule_that_fits(question: str) -> None:
    sentences = declarative_sentences(question, "X")
    assert sentences[:1] == [DECLARATIVES[question]] if DECLARATIVES[question] else not sentences


@pytest.mark.parametrize("question", ["who wrote emma", "why {answer} is it?", "WHEN?", "a \\1 b"])
@pytest.mark.parametrize("answer", ["Jane Austen", "{0} {question}", "\\g<1>.", "No."])
def test_statements_are_different_and_tell_the_answer(question: str, answer: str) -> None:
    made = pattern_statements(question, answer, 300, Draws(0, "a"))
    assert len(set(made)) == len(made) == 300
    assert all(mentions(statement, answer) for statement in made)
    assert all(statement[0] == statement[0].upper() for statement in made)
    assert all(statement.endswith(".") and not statement.endswith("..") for statement in made)
    assert made[:64] == pattern_statements(question, answer, 64, Draws(0, "a"))
    assert made[:64] != pattern_statements(question, answer, 64, Draws(1, "a"))[:64]
    plain = sum('"' not in statement for statement in made[:64])
    assert plain == 0 if question != "who wrote emma" else 28 <= plain <= 36


def test_sentences_end_where_they_should() -> None:
    sentences = [sentence.strip() for sentence in split_sentences(TEXT)]
    assert sentences == [
        "The harbour of Brel was dug by Dr. A. B. Stone in 1871.",
        "It cost 3.5 million crowns!",
        '"Too much,"',
        "said the mayor.",
        '"Far too much."',
        "Was it?",
        "Nobody knows.",
        "= The lighthouse =",
        "It stands on the U.S. side, e.g. near the pier.",
        "It burns oil... and its lamp turns.",
    ]


def test_chunks_lose_nothing_and_have_about_the_length_asked_for() -> None:
    chance = random.Random(0)
    pieces = ["One two three. ", "A!\n", "word " * 9 + "end.  ", "\n\n", "x" * 30 + " ", "no stop "]
    for _ in range(300):
        text = "".join(chance.choices(pieces, k=chance.randrange(1, 80)))
        num_words = chance.randrange(5, 60)
        chunks = split_chunks(text, num_words)
        assert "".join(chunks) == (text if text.strip() else "")
        lengths = [len(chunk.split()) for chunk in chunks]
        # whole sentences of up to twice the length, and a short last chunk added to another
        assert all(0 < length <= 2.5 * num_words for length in lengths)
        ends = set(itertools.accumulate(map(len, split_sentences(text))))
        cuts = itertools.accumulate(map(len, chunks))
        longest = max(len(sentence.split()) for sentence in split_sentences(text))
        assert longest > 2 * num_words or set(cuts) <= ends
    even = split_chunks("Five words in a sentence. " * 1000, 50)
    assert [len(chunk.split()) for chunk in even] == [50] * 100
    assert split_chunks("", 10) == split_chunks(" \n", 10) == []


def test_rewrites_are_different_and_made_of_the_sentences() -> None:
    made = pattern_rewrites(TEXT, 64, Draws(0))
    assert len(set(made)) == len(made) == 64
    sentences = [sentence.strip() for sentence in split_sentences(TEXT)]
    told = collections.Counter(s for s in sentences for rewrite in made if s in rewrite)
    assert all(sum(s in rewrite for s in sentences) >= 5 for rewrite in made)
    assert min(told[sentence] for sentence in sentences) > 64 // 2
    assert 1 <= len(pattern_rewrites("One sentence.", 200, Draws(0))) < 200


def test_parts_share_no_question_and_leave_none_out(questions: str) -> None:
    def ids(**subset: Any) -> list[str]:
        options = StreamOptions(count=2, subset=Subset(**subset))
        return [fact.id for fact in make_facts(questions, options, print)]

    everything = ids()
    assert everything == [str(n) for n in range(400)]
    for num_parts in (2, 3):
        parts = [ids(part=f"{i}/{num_parts}") for i in range(1, num_parts + 1)]
        assert sorted(itertools.chain(*parts), key=int) == everything
        assert all(0.8 < len(part) * num_parts / 400 < 1.2 for part in parts)
    half = ids(part="1/2")
    assert ids(part="1/2", skip=10, limit=20) == half[10:30]
    assert ids(skip=395) == everything[395:]


def test_a_question_in_other_case_and_signs_is_in_the_same_part() -> None:
    asked = [f"who wrote book {n}" for n in range(50)]
    again = [f"Who  wrote: Book {n}?" for n in range(50)]
    subset = Subset("1/2")
    chosen = subset.of(asked, str)
    assert [again.index(text) for text in subset.of(again, str)] == list(map(asked.index, chosen))
    assert 0 < len(chosen) < 50


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3"])
def test_wrong_parts_are_named(part: str) -> None:
    with pytest.raises(ConfigError, match="part: got"):
        Subset(part)


def test_texts_come_from_a_field(tmp_path: Path) -> None:
    facts = [
        {"id": "a", "question": "q?", "answers": ["x"], "said": ["It is x.", "x.", "x."]},
        {"id": "b", "question": "r?", "answers": ["y"], "said": ["It is y."]},
    ]
    path = str(tmp_path / "facts.jsonl")
    write_lines(path, facts)
    made = make_facts(path, StreamOptions(from_field="said"), print)
    assert [fact.statements for fact in made] == [("It is x.", "x."), ("It is y.",)]
    with pytest.raises(DataError, match=r"facts.jsonl:1: has no field 'sad', but id, question"):
        make_facts(path, StreamOptions(from_field="sad"), print)

    chunks: list[dict[str, Any]] = [
        {"id": 7, "passage": "One.", "said": ["1."]},
        {"passage": "Two.", "said": ["2."]},
    ]
    write_lines(path, chunks)
    options = StreamOptions(from_field="said", text=TextOptions(field="passage"))
    documents = make_documents([path], options, print)
    assert documents == [Document("7", "One.", ("1.",)), Document("000001", "Two.", ("2.",))]
    with pytest.raises(DataError, match=r"facts.jsonl:1: has no field 'text', but id, passage"):
        make_documents([path], StreamOptions(from_field="said"), print)
    write_lines(path, [chunks[0], chunks[0]])
    with pytest.raises(DataError, match=r"facts.jsonl:2: has the id '7' of .*facts.jsonl:1; give"):
        make_documents([path], options, print)


def test_text_of_facts_states_all_and_asks_a_share() -> None:
    def fact(n: int) -> Fact:
        return Fact(str(n), tuple(f"<{n} {m}>" for m in range(12)), f"q {n}", (f"a {n}", "b"))

    facts = [fact(n) for n in range(400)]
    texts = [row["text"] for row in text_of_facts(facts, 8, 0.75, seed=1)]
    joined = "\n".join(texts)
    asked = [fact for fact in facts if f"Q: {fact.question}\nA: {fact.answers[0]}\n" in joined]
    assert 0.65 < len(asked) / len(facts) < 0.85
    for fact_ in facts:
        stated = [joined.count(statement) for statement in fact_.statements]
        assert stated == [1] * 8 + [0] * 4
        assert joined.count(f"Q: {fact_.question}\n") == 8 * (fact_ in asked)
    assert texts == [row["text"] for row in text_of_facts(facts, 8, 0.75, seed=1)]
    assert texts != [row["text"] for row in text_of_facts(facts, 8, 0.75, seed=2)]
    assert not any("Q: " in row["text"] for row in text_of_facts(facts, 1, 0.0, seed=1))


def test_the_tool_writes_streams_that_can_be_read(
    questions: str, make_stream: Callable[..., ToolRun], tmp_path: Path
) -> None:
    facts, documents, text = (str(tmp_path / f"{name}.jsonl") for name in "fdt")
    (tmp_path / "text.txt").write_text(TEXT)
    commands = [
        ["facts", questions, "--output", facts, "--part", "2/2", "--limit", "30"],
        ["documents", str(tmp_path / "text.txt"), "--output", documents, "--chunk-words", "15"],
        ["text", facts, "--output", text, "--statements", "4"],
    ]
    told, contents = "", []
    for command in commands:
        done = make_stream(*command)
        assert done.code == 0, done.err
        told += done.out
        contents.append(Path(command[3]).read_bytes())
    for command in commands:  # in another process, which hashes otherwise
        subprocess.run([sys.executable, TOOL, *command, "--overwrite"], check=True, timeout=60)
    assert [Path(command[3]).read_bytes() for command in commands] == contents
    assert "f.jsonl: 30 facts, 1,920 statements, " in told
    assert len(read_records(facts, Fact)) == 30
    chunks = read_records(documents, Document)
    assert [chunk.id for chunk in chunks] == [f"00000{d}-00{n}" for d in (0, 1) for n in (0, 1)]
    assert all(json.loads(line)["text"] for line in Path(text).read_text().splitlines())


def test_the_tool_names_mistakes(
    questions: str, make_stream: Callable[..., ToolRun], tmp_path: Path
) -> None:
    output = str(tmp_path / "out.jsonl")
    for args, message in {
        ("--output", questions): "questions.jsonl: exists; choose another output",
        ("--output", str(tmp_path / "out.json")): "ends in .jsonl",
        ("--output", output, "--statements", "0"): "count: got 0; allowed: 1 or more",
        ("--output", output, "--skip", "400"): "gives no record (part, skip and limit",
        ("--output", output, "--model", "m"): "--endpoint: got ''; allowed: a URL",
        ("--output", output, "--endpoint", "http://a/v1"): "model: got ''; allowed: the name",
        (
            *("--output", output, "--endpoint", "http://a/v1", "--model", "m"),
            *("--from-field", "said"),
        ): "endpoint: got 'http://a/v1'; allowed: not together with a field",
    }.items():
        done = make_stream("facts", questions, *args)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err.startswith("error: ")
        assert message in done.err
        assert not Path(output).exists()
