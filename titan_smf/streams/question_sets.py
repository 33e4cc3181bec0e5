"""Questions with their reference answers, from the forms in which question sets are published.

    NQ-open      {"question": text, "answer": [text, ...]}
    TriviaQA     {"question_id": text, "question": text, "answer": {"value": text, "aliases": [...],
                 "normalized_aliases": [...]}}
    SimpleQA     {"problem": text, "answer": text}
    facts        {"id": text, "question": text, "answers": [text, ...]}, with or without statements

Each row is read by its own fields; others beside them are passed over.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from titan_smf.data.fields import RowError, excerpt, id_of, text_of, texts_of
from titan_smf.data.rows import Row, read_rows
from titan_smf.errors import DataError
from titan_smf.world.source import SYNTHETIC_PREFIX, parse_world

FORMS = (
    'a question is {"question": text, "answer": text, [text, ...] or {"value": text, "aliases": '
    '[text, ...]}}, {"problem": text, "answer": text} or {"question": text, "answers": [text, ...]}'
)
TRIVIAQA_HIDDEN = "<unk>"
"""The answer in TriviaQA's test split, whose answers are not published."""


@dataclass(frozen=True)
class Question:
    """A question and what answers it."""

    id: str
    """Unique in its set: the set's own `id` or `question_id`, or else the row's number from 0."""
    question: str
    answers: tuple[str, ...]
    """Each is right by itself, the set's preferred one first; at least one, all different."""


def open_questions(path: str, limit: int | None = None, skip: int = 0) -> list[Question]:
    """`limit` questions of a set, or all, in its order, after the first `skip`; at least one.

    A row that repeats an earlier id with the same question is left out: TriviaQA's `rc` lists a
    question once for the web and once for Wikipedia.

    Args:
        path: a jsonl, csv or parquet file, glob or URL; `hf:NAME?config=C&split=S` (see rows.py);
            or `synthetic:world?seed=0&set=new_facts&...`, a set of facts of the invented world
            (see `world.source.parse_world`).
        limit: a hub dataset is read no further than that needs.

    Raises:
        DataError: nothing there, a row that is no question, or none left after `skip`.
        ConfigError: a path whose settings are unknown.
    """
    stop = None if limit is None else skip + limit
    questions = [question for question, _ in itertools.islice(read_questions(path), skip, stop)]
    if not questions:
        raise DataError(f"{path}: holds no question{f' after the first {skip}' if skip else ''}")
    return questions


def read_questions(path: str) -> Iterator[tuple[Question, Row]]:
    """All questions of a set as `open_questions` has them, each with its row; may be none."""
    if path.startswith(SYNTHETIC_PREFIX):
        yield from _world_questions(path)
        return
    question_of_id: dict[str, str] = {}
    for number, row in enumerate(read_rows(path)):
        question = _question_of(row, number)
        if question.id not in question_of_id:
            question_of_id[question.id] = question.question
            yield question, row
        elif (before := question_of_id[question.id]) != question.question:
            raise DataError(
                f"{row.where}: has the id {question.id!r} of another question, {excerpt(before)}; "
                "give each its own"
            )


def _question_of(row: Row, number: int) -> Question:
    try:
        name = next((key for key in ("question", "problem") if key in row.values), None)
        if name is None:
            raise RowError(f"has neither 'question' nor 'problem', but {_keys(row)}")
        question = text_of(row.values[name], name)
        return Question(_id(row.values, number), question, _answers(row))
    except RowError as error:
        raise DataError(f"{row.where}: {error}; {FORMS}") from error


def _world_questions(path: str) -> Iterator[tuple[Question, Row]]:
    world, _, fact_set = parse_world(path)
    for fact in world.fact_set(fact_set):
        question = Question(fact.id, world.question(fact), (fact.answer,))
        yield question, Row(f"{path}: {fact.id}", {})


def _id(values: dict[str, Any], number: int) -> str:
    for key in ("id", "question_id"):
        if key in values:
            return id_of(values[key], key)
    return str(number)


def _answers(row: Row) -> tuple[str, ...]:
    values = row.values
    if "answers" in values:
        return _distinct(texts_of(values["answers"], "answers"))
    if "answer" not in values:
        raise RowError(f"has neither 'answer' nor 'answers', but {_keys(row)}")
    answer = values["answer"]
    if isinstance(answer, dict):
        return _triviaqa_answers(answer)
    if isinstance(answer, list):
        return _distinct(texts_of(answer, "answer"))
    return (text_of(answer, "answer"),)


def _triviaqa_answers(answer: dict[str, Any]) -> tuple[str, ...]:
    """The value, then the aliases, then what TriviaQA's own normalisation makes of them."""
    value = text_of(answer.get("value"), "answer.value")
    if value == TRIVIAQA_HIDDEN:
        raise RowError(f"answer.value is {value}: the answers of this split are not published")
    texts = [value]
    for key in ("aliases", "normalized_aliases"):
        others = answer.get(key, [])
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise RowError(f"answer.{key} is {excerpt(others)}, not a list of texts")
        texts += filter(str.strip, others)  # an alias of nothing but signs is normalised to ""
    return _distinct(texts)


def _distinct(texts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _keys(row: Row) -> str:
    return ", ".join(map(str, row.values)) or "no field"
