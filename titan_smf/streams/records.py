"""The records of streams, from jsonl files with one record a line or from the invented world.

A file is a path or fsspec URL and may be compressed (.gz, .zst). Its lines are in the order of
learning, each checked at once; blank ones are skipped. The fields of a line are those of the
record's dataclass; others beside them are ignored.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from titan_smf import storage
from titan_smf.data.fields import RowError, text_of, texts_of
from titan_smf.data.rows import jsonl_rows, kind_of
from titan_smf.errors import ConfigError, DataError
from titan_smf.world import world as world_facts
from titan_smf.world.source import SYNTHETIC_PREFIX, parse_world
from titan_smf.world.world import FIRST_UNSEEN_STATEMENT, STREAM_STATEMENTS, World


@dataclass(frozen=True)
class Fact:
    """A line of a fact stream, and of a question set."""

    id: str
    """Unique in its stream."""
    statements: tuple[str, ...]
    """The fact in different words; each stands alone."""
    question: str
    """Asks for the fact; never trained on."""
    answers: tuple[str, ...]
    """Each is right by itself."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What is trained on, one text a sequence."""
        return self.statements


@dataclass(frozen=True)
class Document:
    """A line of a document stream."""

    id: str
    """Unique in its stream."""
    chunk: str
    """A part of a document as it is. Not trained on: to do so, add it to the rewrites."""
    rewrites: tuple[str, ...]
    """What the chunk says, in different words."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What is trained on, one text a sequence."""
        return self.rewrites


Record = Fact | Document
"""What is learned in one step. All fields are of type `str` or `tuple[str, ...]`, never empty."""
AnyRecord = TypeVar("AnyRecord", Fact, Document)


def read_records(path: str, record_type: type[AnyRecord]) -> list[AnyRecord]:
    """Return all records of a stream file in its order, at least one.

    Raises:
        DataError: the file, or the line, that cannot be used, and what a line should be.
    """
    kind, compression = kind_of(path)
    if kind != "jsonl":
        raise DataError(f"{path}: is {kind}; a stream is jsonl, {_line_format(record_type)}")
    if not storage.exists(path):
        raise storage.missing(path)
    records: list[AnyRecord] = []
    line_of_id: dict[str, int] = {}
    with storage.open_binary(path, compression) as lines:
        for number, row in jsonl_rows(lines):
            try:
                record = _record_of(row, record_type)
                if record.id in line_of_id:
                    raise RowError(f"has the id {record.id!r} of line {line_of_id[record.id]}")
            except RowError as error:
                advice = f"correct or remove the line: {_line_format(record_type)}"
                raise DataError(f"{path}:{number}: {error}; {advice}") from error
            line_of_id[record.id] = number
            records.append(record)
    if not records:
        raise DataError(f"{path}: holds nothing to learn: {_line_format(record_type)}")
    return records


def open_stream(path: str, kind: Literal["facts", "documents"]) -> Sequence[Record]:
    """Return the records of `stream.path`, in the order of learning.

    Args:
        path: a jsonl file, path or fsspec URL, of lines like `Fact` or `Document`; or a
            `synthetic:world?...` source, of which the facts of `set` (default: the new ones) are to
            be learned, or as documents the new facts.

    Raises:
        DataError: a missing file, or a line that cannot be used.
        ConfigError: a synthetic source with unknown settings or without new facts.
    """
    if not path.startswith(SYNTHETIC_PREFIX):
        return read_records(path, Fact) if kind == "facts" else read_records(path, Document)
    try:
        world, _, fact_set = parse_world(path)
    except ConfigError as error:
        raise ConfigError("stream.path", path, error.allowed) from error
    records: Sequence[Record] = (
        fact_stream(world, world.fact_set(fact_set)) if kind == "facts" else document_stream(world)
    )
    if not records:
        allowed = f"{fact_set}=1 or more: they are what is learned"
        raise ConfigError("stream.path", path, allowed)
    return records


def fact_stream(
    world: World, facts: Iterable[world_facts.Fact], num_statements: int = STREAM_STATEMENTS
) -> list[Fact]:
    """Return a fact stream that states each of the facts in as many paraphrases, one fact a record.

    Paraphrases of known facts are such as the text does not have. It is also a question set: every
    record has a question and its answer.
    """
    return [
        Fact(
            id=fact.id,
            statements=tuple(
                world.statements(
                    fact, num_statements, FIRST_UNSEEN_STATEMENT if fact.role == "known" else 0
                )
            ),
            question=world.question(fact),
            answers=(fact.answer,),
        )
        for fact in facts
    ]


def document_stream(world: World, num_rewrites: int = STREAM_STATEMENTS) -> list[Document]:
    """Return a document stream that states every new fact in one chunk of up to seven facts."""
    return [
        Document(f"chunk-{number:04d}", chunk, tuple(rewrites))
        for number, (chunk, *rewrites) in enumerate(world.chunks(num_rewrites))
    ]


def _record_of(row: dict[str, Any] | RowError, record_type: type[AnyRecord]) -> AnyRecord:
    if isinstance(row, RowError):
        raise row
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record_type):
        if field.name not in row:
            raise RowError(f"has no {field.name!r}, but {', '.join(row) or 'no key'}")
        check = text_of if field.type is str else texts_of
        values[field.name] = check(row[field.name], field.name)
    return record_type(**values)


def _line_format(record_type: type[Record]) -> str:
    fields = (
        f'"{field.name}": {"text" if field.type is str else "[text, ...]"}'
        for field in dataclasses.fields(record_type)
    )
    return f"each line of a {record_type.__name__.lower()} stream is {{{', '.join(fields)}}}"
