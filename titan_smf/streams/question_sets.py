"""Questions with their reference answers, from the forms in which question sets are published.

    NQ-open      {"question": text, "answer": [text, ...]}
    TriviaQA     {"question_id": text, "question": text, "answer": {"value": text, "aliases": [...],
                 "normalized_aliases": [...]}}
    SimpleQA     {"problem": text, "answer": text}
    facts        {"id": text, "question": text, "answers": [text, ...]}, with or without statements

Each row is read by its own fields; others beside them are passed over.
"""

import itertools
from collections.abc import Iterator, Sequence
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
    """Return `limit` questions of a set, or all, in its order, after the first `skip`.

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
    """Yield all questions of a set as `open_questions` has them, each with its row."""
    if path.startswith(SYNTHETIC_PREFIX):
        world, _, fact_set = parse_world(path)
        for fact in world.fact_set(fact_set):
            question = Question(fact.id, world.question(fact), (fact.answer,))
            yield question, Row(f"{path}: {fact.id}", {})
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
    values = row.values
    name = next((key for key in ("question", "problem") if key in values), None)
    id_key = next((key for key in ("id", "question_id") if key in values), None)
    try:
        if name is None:
            raise RowError(f"has neither 'question' nor 'problem', but {_fields_of(row)}")
        question = text_of(values[name], name)
        question_id = str(number) if id_key is None else id_of(values[id_key], id_key)
        return Question(question_id, question, tuple(dict.fromkeys(_answers(row))))
    except RowError as error:
        raise DataError(f"{row.where}: {error}; {FORMS}") from error


def _answers(row: Row) -> Sequence[str]:
    if "answers" in row.values:
        return texts_of(row.values["answers"], "answers")
    if "answer" not in row.values:
        raise RowError(f"has neither 'answer' nor 'answers', but {_fields_of(row)}")
    answer = row.values["answer"]
    if isinstance(answer, dict):
        return _triviaqa_answers(answer)
    return texts_of(answer, "answer") if isinstance(answer, list) else [text_of(answer, "answer")]


def _triviaqa_answers(answer: dict[str, Any]) -> list[str]:
    """Return the value, then the aliases, then those as TriviaQA's own normalisation has them."""
    value = text_of(answer.get("value"), "answer.value")
    if value == TRIVIAQA_HIDDEN:
        raise RowError(f"answer.value is {value}: the answers of this split are not published")
    texts = [value]
    for key in ("aliases", "normalized_aliases"):
        others = answer.get(key, [])
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise RowError(f"answer.{key} is {excerpt(others)}, not a list of texts")
        texts += filter(str.strip, others)  # an alias of nothing but signs is normalised to ""
    return texts


def _fields_of(row: Row) -> str:
    return ", ".join(map(str, row.values)) or "no field"
