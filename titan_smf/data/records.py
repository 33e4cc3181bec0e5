"""Streams of what is to be learned: jsonl files with one record a line, each checked at once.

A stream is a path or fsspec URL and may be compressed (.gz, .zst). Its lines are in the order of
learning; blank ones are passed over. The fields of a record are those of its dataclass; a line may
have others beside them, which are not read.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

from titan_smf import storage
from titan_smf.data.raw_text import kind_of
from titan_smf.errors import DataError

EXCERPT = 40
"""Characters of a wrong value that a message repeats."""


@dataclass(frozen=True)
class Record(ABC):
    """What is learned in one step. Fields are of type `str` or `tuple[str, ...]`, never empty."""

    id: str
    """Unique in its stream."""

    @property
    @abstractmethod
    def texts(self) -> tuple[str, ...]:
        """What a step trains on, one text a sequence."""


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
                raise _NoRecordError(f"has the id {record.id!r} of line {line_of_id[record.id]}")
        except _NoRecordError as error:
            raise DataError(
                f"{path}:{number}: {error}; correct or remove the line: {_form(record_type)}"
            ) from error
        line_of_id[record.id] = number
        records.append(record)
    if not records:
        raise DataError(f"{path}: holds nothing to learn: {_form(record_type)}")
    return records


class _NoRecordError(Exception):
    """Why a line is no record."""


def _parse(line: bytes, record_type: type[AnyRecord]) -> AnyRecord:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise _NoRecordError(f"is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise _NoRecordError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _NoRecordError(f"is {_excerpt(row)}, not an object")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record_type):
        if field.name not in row:
            raise _NoRecordError(f"has no {field.name!r}, but {', '.join(row) or 'no key'}")
        check = _text if field.type is str else _texts
        values[field.name] = check(row[field.name], field.name)
    return record_type(**values)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _NoRecordError(f"{name} is {_excerpt(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _NoRecordError(f"{name} holds half of a surrogate pair") from error
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise _NoRecordError(f"{name} is {_excerpt(value)}, not a list of one text or more")
    return tuple(_text(text, f"{name}[{index}]") for index, text in enumerate(value))


def _excerpt(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= EXCERPT else f"{shown[:EXCERPT]}..."


def _form(record_type: type[Record]) -> str:
    """What a line of the stream looks like."""
    fields = (
        f'"{field.name}": {"text" if field.type is str else "[text, ...]"}'
        for field in dataclasses.fields(record_type)
    )
    return f"each line of a {record_type.__name__.lower()} stream is {{{', '.join(fields)}}}"
