"""Streams of what is to be learned: jsonl files with one record a line, each checked at once.

A stream is a path or fsspec URL and may be compressed (.gz, .zst). Its lines are in the order of
learning; blank ones are passed over. The fields of a record are those of its dataclass; a line may
have others beside them, which are not read.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

from titan_smf import storage
from titan_smf.data.fields import RowError, parse_json, text_of, texts_of
from titan_smf.data.rows import kind_of
from titan_smf.errors import DataError


@dataclass(frozen=True)
class Record(ABC):
    """What is learned in one step. Fields are of type `str` or `tuple[str, ...]`, never empty."""

    id: str
    """Unique in its stream."""

    @property
    @abstractmethod
    def texts(self) -> tuple[str, ...]:
        """What a step trains on, one text a sequence."""


@dataclass(frozen=True)
class Fact(Record):
    """A line of a fact stream, and of a question set."""

    statements: tuple[str, ...]
    """The fact in different words; each stands alone."""
    question: str
    """Asks for the fact; never trained on."""
    answers: tuple[str, ...]
    """Each is right by itself."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.statements


@dataclass(frozen=True)
class Document(Record):
    """A line of a document stream."""

    chunk: str
    """A part of a document as it is. Not trained on: to do so, add it to the rewrites."""
    rewrites: tuple[str, ...]
    """What the chunk says, in different words."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.rewrites


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_records(path: str, record_type: type[AnyRecord]) -> list[AnyRecord]:
    """All records of a stream, in its order; at least one.

    Raises:
        DataError: the file, or the line, that cannot be used, and what a line should be.
    """
    kind, compression = kind_of(path)
    if kind != "jsonl":
        raise DataError(f"{path}: is {kind}; a stream is jsonl, {_form(record_type)}")
    if not storage.exists(path):
        raise storage.missing(path)
    with storage.open_binary(path, compression) as file:
        lines = file.read().split(b"\n")

    records: list[AnyRecord] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _parse(line, record_type)
            if record.id in line_of_id:
                raise RowError(f"has the id {record.id!r} of line {line_of_id[record.id]}")
        except RowError as error:
            raise DataError(
                f"{path}:{number}: {error}; correct or remove the line: {_form(record_type)}"
            ) from error
        line_of_id[record.id] = number
        records.append(record)
    if not records:
        raise DataError(f"{path}: holds nothing to learn: {_form(record_type)}")
    return records


def _parse(line: bytes, record_type: type[AnyRecord]) -> AnyRecord:
    row = parse_json(line)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record_type):
        if field.name not in row:
            raise RowError(f"has no {field.name!r}, but {', '.join(row) or 'no key'}")
        check = text_of if field.type is str else texts_of
        values[field.name] = check(row[field.name], field.name)
    return record_type(**values)


def _form(record_type: type[Record]) -> str:
    """What a line of the stream looks like."""
    fields = (
        f'"{field.name}": {"text" if field.type is str else "[text, ...]"}'
        for field in dataclasses.fields(record_type)
    )
    return f"each line of a {record_type.__name__.lower()} stream is {{{', '.join(fields)}}}"
