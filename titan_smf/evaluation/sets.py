"""Evaluation sets as a configuration names them: completed, checked, and opened as tasks."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from titan_smf import storage
from titan_smf.config.parsing import describe_type
from titan_smf.config.sections import Evaluation, EvaluationKind, EvaluationSet
from titan_smf.data.rows import HUB_PREFIX, Row, read_rows
from titan_smf.data.sources import open_source
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError, DataError
from titan_smf.evaluation.tasks import AnswerTask, ChoiceTask, QuestionTask, Task, TokenTask
from titan_smf.evaluation.templates import load_template
from titan_smf.streams.question_sets import open_questions
from titan_smf.world.source import SYNTHETIC_PREFIX

KEY = "evaluation.sets"
SPLIT_NAMES = ("train", "dev", "validation", "valid", "test")
"""Names of files that say nothing without their folder's."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NAME_AND_PATH = re.compile(rf"({_NAME.pattern})=(.+)", re.DOTALL)


def open_sets(
    settings: Evaluation,
    tokenizer: Tokenizer,
    max_seq_len: int,
    text_seq_len: int,
    cache: str = "",
) -> list[Task]:
    """Read and tokenise all sets of `[evaluation]`.

    Args:
        max_seq_len: tokens that the model can read.
        text_seq_len: length of the sequences of text.
        cache: folder for text that is prepared on first use.

    Raises:
        ConfigError, DataError: a set that cannot be used, or two of one name.
    """

    def open_set(given: EvaluationSet) -> Task:
        if given.kind == "tokens":
            return TokenTask(given, open_source(given.path, tokenizer, cache), text_seq_len)
        template = load_template(given.template)
        available = len(template.examples)
        if given.shots > available:
            allowed = f"at most {available}, the examples of template {given.template}"
            raise ConfigError(KEY, f"shots = {given.shots}", f"{allowed} ({given.name})")
        given = replace(given, shots=available if given.shots == -1 else given.shots)
        template = template.with_shots(given.shots)
        if given.kind == "questions":
            questions = open_questions(given.path, given.limit or None, given.skip)
            new = settings.max_new_tokens
            return QuestionTask(given, questions, template, tokenizer, new, max_seq_len)
        kind = ChoiceTask if given.kind == "choices" else AnswerTask
        rows = _rows(given.path, given.limit, given.skip, given.kind)
        return kind(given, rows, template, tokenizer, max_seq_len)

    tasks = []
    for given in complete_sets(settings):
        try:
            tasks.append(open_set(given))
        except ConfigError as error:
            if error.got == given.path:  # `parse_world` does not know whose path it is
                raise ConfigError(KEY, given.path, error.allowed) from error
            raise
    return tasks


def complete_sets(settings: Evaluation) -> list[EvaluationSet]:
    """Fill in the names, kinds and templates that the sets of `[evaluation]` leave open.

    Raises:
        ConfigError, DataError: a set that cannot be used, or whose first row cannot be read; two
            of one name.
    """
    completed: list[EvaluationSet] = []
    for given in settings.sets:
        complete = _complete(given, settings.template)
        if complete.name in (other.name for other in completed):
            allowed = f"one set of the name {complete.name}; name the others, NAME=PATH or name = "
            raise ConfigError(KEY, complete.path, allowed)
        completed.append(complete)
    return completed


def _complete(given: EvaluationSet | str, template: str) -> EvaluationSet:
    if isinstance(given, str):
        if given.lstrip("[ ").startswith("{"):  # tables that did not fit, taken for a list of paths
            raise ConfigError(KEY, given, describe_type(EvaluationSet))
        named = _NAME_AND_PATH.fullmatch(given)
        given = EvaluationSet(named[2], named[1]) if named else EvaluationSet(given)
    if not given.path:
        raise ConfigError(KEY, given.path, "a path")
    name = given.name or _name_of(given.path)
    if not _NAME.fullmatch(name):
        raise ConfigError(KEY, name, "a name of letters, digits, _, - and ., beginning with one")
    if given.shots < -1:
        raise ConfigError(KEY, f"shots = {given.shots}", f"0 or more, or -1 for all ({name})")
    if given.skip < 0:
        raise ConfigError(KEY, f"skip = {given.skip}", f"0 or more ({name})")
    if given.limit < 0:
        raise ConfigError(KEY, f"limit = {given.limit}", f"1 or more, or 0 for all ({name})")
    kind = _kind_of(given.path) if given.kind == "auto" else given.kind
    if kind == "questions":
        given = replace(given, template=given.template or template)
    if kind != "tokens" and not given.template:
        given = replace(given, template=_template_for(given.path, kind))
    return replace(given, name=name, kind=kind)


def _rows(path: str, limit: int, skip: int = 0, kind: str = "") -> Sequence[Row]:
    if path.startswith(SYNTHETIC_PREFIX) and kind == "likelihood":
        questions = open_questions(path, limit or None, skip)
        return [Row(path, {"question": q.question, "answer": q.answers[0]}) for q in questions]
    rows = list(itertools.islice(read_rows(path), skip, skip + limit if limit else None))
    if not rows:
        raise DataError(f"{path}: holds no item")
    return rows


def _template_for(path: str, kind: str) -> str:
    """Return the name of the template of a set that names none."""
    if kind == "choices":
        return "hellaswag" if "activity_label" in _rows(path, 1)[0].values else "choice"
    if path.startswith(SYNTHETIC_PREFIX):
        return "world"
    return {"questions": "question", "likelihood": "gsm8k"}[kind]


def _kind_of(path: str) -> EvaluationKind:
    """Return what a set measures, told by its path and the fields of its first row."""
    if path.startswith(SYNTHETIC_PREFIX):
        return "tokens" if "split=" in path else "questions"
    is_rows = path.startswith(HUB_PREFIX) or not storage.exists(path)  # a glob, or missing
    if not is_rows and (storage.is_folder(path) or re.search(r"\.txt(\.\w+)?$", path.lower())):
        return "tokens"
    fields = _rows(path, 1)[0].values
    answer = fields.get("answer")
    if "endings" in fields:
        return "choices"
    if isinstance(answer, str) and "####" in answer:  # GSM8K's mark before the result
        return "likelihood"
    if "question" in fields or "problem" in fields:
        return "questions"
    if "text" in fields:
        return "tokens"
    raise DataError(
        f"{path}: has the fields {', '.join(fields)}, which are those of no known set; say its kind"
    )


def _name_of(path: str) -> str:
    """Return a name after a path: its last part, with its folder's where that alone is vague."""
    main, _, query = path.partition("?")
    if path.startswith(SYNTHETIC_PREFIX):
        chosen = re.search(r"\b(?:set|split)=(\w+)", query)
        return chosen[1] if chosen else "world"
    parts = [part for part in main.removeprefix(HUB_PREFIX).split("/") if part]
    stem = re.sub(r"(\.(jsonl|csv|parquet|txt|gz|zst))+$", "", parts[-1]) if parts else ""
    if stem in SPLIT_NAMES and len(parts) > 1:
        stem = f"{Path(parts[-2]).name}_{stem}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", stem).lstrip("_.-")
