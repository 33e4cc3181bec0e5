"""Question sets: published forms read alike from every kind of file; what is none is named."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from titan_smf.errors import ConfigError, DataError
from titan_smf.streams.question_sets import Question, open_questions
from titan_smf.world.world import World

NQ_OPEN: list[dict[str, Any]] = [
    {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]},
    {"question": "größter See\u2028?", "answer": ["Caspian Sea", "Caspian Sea"]},
    {"question": 'a comma, and a "quote"\nand a line', "answer": ["yes"]},
]
NQ_QUESTIONS = [
    Question("0", "who wrote emma", ("Jane Austen", "Austen")),
    Question("1", "größter See\u2028?", ("Caspian Sea",)),
    Question("2", 'a comma, and a "quote"\nand a line', ("yes",)),
]
TRIVIAQA = {
    "question": "Which American-born Sinclair won the Nobel Prize for Literature in 1930?",
    "question_id": "tc_1",
    "question_source": "http://www.triviacountry.com/",
    "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
    "search_results": {"description": [], "filename": [], "rank": [], "title": [], "url": []},
    "answer": {
        "aliases": ["(Harry) Sinclair Lewis", "Sinclair Lewis", "!"],
        "normalized_aliases": ["harry sinclair lewis", "sinclair lewis", ""],
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
        "normalized_value": "sinclair lewis",
        "type": "WikipediaEntity",
        "value": "Sinclair Lewis",
    },
}
TRIVIAQA_ANSWERS = (
    "Sinclair Lewis",
    "(Harry) Sinclair Lewis",
    "!",
    "harry sinclair lewis",
    "sinclair lewis",
)
SIMPLEQA = {"metadata": "{'topic': 'Art'}", "problem": "Who, in 1975?", "answer": 'Ada "A" Byron'}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_nq_open_is_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "nq.jsonl", NQ_OPEN)
    zipped, zstd = tmp_path / "nq.jsonl.gz", tmp_path / "nq.jsonl.zst"
    zipped.write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    zstd.write_bytes(zstandard.compress(Path(jsonl).read_bytes()))
    parquet = str(tmp_path / "nq.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(NQ_OPEN), parquet)
    url = "memory://questions/nq.jsonl"
    fsspec.filesystem("memory").pipe_file("/questions/nq.jsonl", Path(jsonl).read_bytes())
    hub = tmp_path / "hub"
    hub.mkdir()
    write_jsonl(hub / "train.jsonl", NQ_OPEN[:1])
    write_jsonl(hub / "validation.jsonl", NQ_OPEN)
    files = [jsonl, str(zipped), str(zstd), parquet, url]
    for path in (*files, f"hf:{hub}", f"hf:{hub}?split=validation"):
        assert open_questions(path) == NQ_QUESTIONS, path
        assert open_questions(path, limit=1, skip=1) == NQ_QUESTIONS[1:2], path
    assert open_questions(f"hf:{hub}?split=train") == NQ_QUESTIONS[:1]


def test_a_set_in_several_files_has_one_order_and_distinct_ids(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part-1.jsonl", NQ_OPEN[:1])
    write_jsonl(tmp_path / "part-2.jsonl", NQ_OPEN[1:])
    assert open_questions(str(tmp_path / "part-*.jsonl")) == NQ_QUESTIONS


def test_triviaqa_answers_are_the_value_first_then_its_aliases(tmp_path: Path) -> None:
    # rc lists a question for the web and again for Wikipedia
    rows = [TRIVIAQA, {**TRIVIAQA, "question_source": "http://wikipedia.org"}]
    parquet = tmp_path / "rc.parquet"
    features = datasets.Dataset.from_list(rows)
    features.to_parquet(str(parquet))
    hub = tmp_path / "hub" / "rc"
    hub.mkdir(parents=True)
    (hub / "validation-00000-of-00001.parquet").write_bytes(parquet.read_bytes())
    jsonl = write_jsonl(tmp_path / "rc.jsonl", rows)
    for path in (str(parquet), jsonl, f"hf:{hub.parent}"):
        expected = Question("tc_1", str(TRIVIAQA["question"]), TRIVIAQA_ANSWERS)
        assert open_questions(path) == [expected]


def test_simpleqa_is_the_same_from_csv_and_jsonl(tmp_path: Path) -> None:
    table = tmp_path / "simple_qa_test_set.csv"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["problem", "answer", "metadata"])
        writer.writeheader()
        writer.writerow(SIMPLEQA)
    zipped = tmp_path / "test.csv.gz"
    zipped.write_bytes(gzip.compress(table.read_bytes()))
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "test.csv").write_bytes(table.read_bytes())
    jsonl = write_jsonl(tmp_path / "simple.jsonl", [SIMPLEQA])
    for path in (str(table), str(zipped), jsonl, f"hf:{hub}?split=test"):
        assert open_questions(path) == [Question("0", "Who, in 1975?", ('Ada "A" Byron',))]


def test_facts_are_questions_with_or_without_statements(tmp_path: Path) -> None:
    fact = {"id": "f", "statements": ["A is b."], "question": "What is A?", "answers": ["b", "B"]}
    for row in (fact, {key: fact[key] for key in ("id", "question", "answers")}):
        path = write_jsonl(tmp_path / "facts.jsonl", [row])
        assert open_questions(path) == [Question("f", "What is A?", ("b", "B"))]


def test_the_invented_world_asks_the_facts_of_its_sets() -> None:
    world = World(seed=3, num_facts=40, num_new_facts=10)
    path = "synthetic:world?seed=3&facts=40&new_facts=10"
    for name, facts in (("known_facts", world.asked_facts), ("new_facts", world.new_facts)):
        questions = open_questions(f"{path}&set={name}")
        assert [question.id for question in questions] == [fact.id for fact in facts]
        assert [question.answers for question in questions] == [(fact.answer,) for fact in facts]
        assert [question.question for question in questions] == list(map(world.question, facts))
    for wrong in (f"{path}&set=all", "synthetic:world?fact=40"):
        with pytest.raises(ConfigError, match="facts=2000"):
            open_questions(wrong)


FORM = 'a question is {"question": text, "answer": '
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no question": ({"text": "a"}, "has neither 'question' nor 'problem', but text"),
    "empty object": ({}, "has neither 'question' nor 'problem', but no field"),
    "no answer": ({"question": "a"}, "has neither 'answer' nor 'answers', but question"),
    "blank question": ({"question": " ", "answer": "b"}, 'question is " ", not a text'),
    "number": ({"question": "a", "answer": 4}, "answer is 4, not a text"),
    "no answer in the list": ({"question": "a", "answer": []}, "answer is [], not a list of one"),
    "blank answer": ({"question": "a", "answer": ["b", ""]}, 'answer[1] is "", not a text'),
    "surrogate": ({"question": "a\ud800", "answer": "b"}, "question holds half of a surrogate"),
    "hidden": (
        {"question": "a", "answer": {"value": "<unk>", "aliases": []}},
        "answer.value is <unk>: the answers of this split are not published",
    ),
    "no value": ({"question": "a", "answer": {"aliases": ["b"]}}, "answer.value is null"),
    "aliases": (
        {"question": "a", "answer": {"value": "b", "aliases": "c"}},
        'answer.aliases is "c", not a list of texts',
    ),
    "id": ({"id": None, "question": "a", "answer": "b"}, "id is null, not a text"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_no_question_is_named(name: str, tmp_path: Path) -> None:
    row, cause = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "set.jsonl", [NQ_OPEN[0], row])
    with pytest.raises(DataError) as error:
        open_questions(path)
    assert str(error.value).startswith(f"{path}:2: {cause}")
    assert FORM in str(error.value)
    assert open_questions(path, limit=1) == NQ_QUESTIONS[:1]  # reads no further


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", b'\n{"question": \n', r"a\.jsonl:2: is not JSON: "),
    "a list": ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1: is \[1, 2\], not an object"),
    "latin-1": ("a.jsonl", b'{"question": "\xe9"}\n', r"a\.jsonl:1: is not UTF-8"),
    "short line": ("a.csv", b"problem,answer\na,b\nc\n", r"a\.csv:3: has more or fewer values"),
    "long line": ("a.csv", b"problem,answer\na,b,c\n", r"a\.csv:2: .* header, problem, answer"),
    "open quote": ("a.csv", b'problem,answer\na,"b\n', r"a\.csv:2: is not CSV"),
    "latin-1 table": ("a.csv", b"problem,answer\na,\xe9\n", r"a\.csv:2: is not UTF-8"),
    "empty": ("a.jsonl", b"\n", r"a\.jsonl: holds no question"),
    "only a header": ("a.csv", b"problem,answer\n", r"a\.csv: holds no question"),
    "text": ("a.txt", b"who?\n", r"a\.txt: is text without fields; use jsonl, csv or parquet"),
    "unknown": ("a.xml", b"<a/>", r"a\.xml: is of no known kind"),
    "torn parquet": ("a.parquet", b"PAR1", r"a\.parquet: cannot be read: "),
    "torn gzip": ("a.csv.gz", b"\x1f\x8b", r"a\.csv\.gz"),
    "same id": (
        "a.jsonl",
        b'{"id": 1, "question": "a", "answer": "b"}\n{"id": 1, "question": "c", "answer": "d"}\n',
        r"""a\.jsonl:2: has the id '1' of another question, "a"; give each its own""",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_question_set_is_named(name: str, tmp_path: Path) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_questions(str(tmp_path / file))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "nq.jsonl", NQ_OPEN)
    for wrong, message in {
        str(tmp_path / "nr.jsonl"): "does not exist; beside it there is nq.jsonl",
        str(tmp_path): "is a folder; name its files, for example ",
        str(tmp_path / "*.csv"): "no file matches",
        "google/nq_open": "write hf:google/nq_open",
        f"hf:{tmp_path}/none": "cannot be loaded",
    }.items():
        with pytest.raises(DataError, match=re.escape(message)):
            open_questions(wrong)
    with pytest.raises(DataError, match="holds no question after the first 3"):
        open_questions(path, skip=3)
    with pytest.raises(ConfigError, match="hf:NAME"):
        open_questions(f"hf:{tmp_path}?spilt=test")
