"""Rows of data sets, each with the place where it stands.

FILE                       jsonl or csv (either also .gz, .zst) or parquet: a path, a glob of
                           them, or an fsspec URL
hf:NAME?config=C&split=S   a dataset of the Hugging Face hub, or a local folder laid out like
                           one; without a split its `validation`
"""

import csv
import io
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from titan_smf import storage
from titan_smf.data.fields import RowError, parse_json
from titan_smf.data.raw_text import (
    COMPRESSIONS,
    HUB_PREFIX,
    TextOptions,
    kind_of,
    load_hub,
    named_files,
    numbered,
)
from titan_smf.errors import ConfigError, DataError


class Row(NamedTuple):
    """A JSON object, a line of a csv file, or a row of a table."""

    where: str
    """The file and line, for messages."""
    values: dict[str, Any]


def read_rows(path: str) -> Iterator[Row]:
    """All rows that `path` names, in order, files of a glob sorted by name; blank lines left out.

    Raises:
        DataError: a file that is missing or of no known kind, a line that is no row. It is raised
            when the iteration gets there.
        ConfigError: unknown settings after a hub dataset's name.
    """
    if path.startswith(HUB_PREFIX):
        yield from _read_hub(path)
        return
    if storage.is_folder(path):
        raise DataError(f"{path}: is a folder; name its files, for example {path}/*.jsonl")
    for file in named_files(path):
        stem, _, ending = file.lower().rpartition(".")
        compressed = ending in COMPRESSIONS
        if (stem if compressed else file.lower()).endswith(".csv"):
            yield from _read_csv(file, COMPRESSIONS.get(ending))
            continue
        kind, compression = kind_of(file)
        if kind == "txt":
            raise DataError(f"{file}: is text without fields; use jsonl, csv or parquet")
        yield from _read_parquet(file) if kind == "parquet" else _read_jsonl(file, compression)


def _read_jsonl(path: str, compression: str | None) -> Iterator[Row]:
    with storage.open_binary(path, compression) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield Row(where, parse_json(line))
            except RowError as error:
                raise DataError(f"{where}: {error}") from error


def _read_csv(path: str, compression: str | None) -> Iterator[Row]:
    with storage.open_binary(path, compression) as file:
        text = io.TextIOWrapper(io.BufferedReader(file), "utf-8-sig", newline="")  # type: ignore[type-var]
        reader = csv.DictReader(text, strict=True)
        while True:
            where = f"{path}:{max(reader.line_num, 1) + 1}"  # the header is line 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: is not UTF-8: {error.reason}") from error
            except csv.Error as error:
                raise DataError(f"{where}: is not CSV: {error}") from error
            if None in values or None in values.values():
                names = ", ".join(reader.fieldnames or [])
                raise DataError(f"{where}: has more or fewer values than the header, {names}")
            yield Row(where, values)


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    with storage.open_binary(path) as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", values)


def _read_hub(path: str) -> Iterator[Row]:
    name, _, query = path.partition("?")
    settings = dict(parse_qsl(query, keep_blank_values=True))
    if not settings.keys() <= {"config", "split"}:
        raise ConfigError("dataset", path, f"{HUB_PREFIX}NAME?config=C&split=S")
    options = TextOptions(
        hub_config=settings.get("config", ""), hub_split=settings.get("split", "validation")
    )
    for number, values in numbered(load_hub(name, options), path):
        yield Row(f"{path}: row {number}", values)
