"""Rows of data sets, read by the kind of their file, each with the place where it stands.

FILE                       jsonl or csv (either also .gz, .zst) or parquet: a path, a glob of
                           them, or an fsspec URL
hf:NAME?config=C&split=S   a dataset of the Hugging Face hub, or a local folder laid out like
                           one; without a split its `validation`

The readers by kind also serve `raw_text`, which takes documents from parts of files.
"""

import csv
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl

from titan_smf import storage
from titan_smf.data.fields import RowError, parse_json
from titan_smf.errors import ConfigError, DataError

HUB_PREFIX = "hf:"
TEXT_KINDS = ("txt", "jsonl", "parquet")
ROW_KINDS = ("jsonl", "csv", "parquet")
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}

NumberedRows = Iterator[tuple[int, dict[str, Any] | RowError]]
"""Rows with their numbers from 1, which are line numbers in text; an error for an unusable row."""


class Row(NamedTuple):
    """A JSON object, a line of a csv file, or a row of a table."""

    where: str
    """The file and line, for messages."""
    values: dict[str, Any]


def read_rows(path: str) -> Iterator[Row]:
    """Yield all rows that `path` names, in order, files of a glob sorted by name.

    Raises:
        DataError: a file that is missing or of no known kind, a line that is no row. It is raised
            when the iteration gets there.
        ConfigError: unknown settings after a hub dataset's name.
    """
    if path.startswith(HUB_PREFIX):
        name, _, query = path.partition("?")
        settings = {"config": "", "split": "validation"}
        settings |= parse_qsl(query, keep_blank_values=True)
        if settings.keys() != {"config", "split"}:
            raise ConfigError("dataset", path, f"{HUB_PREFIX}NAME?config=C&split=S")
        yield from _located(hub_rows(load_hub(name, **settings), path), path, ": row ")
        return
    if storage.is_folder(path):
        raise DataError(f"{path}: is a folder; name its files, for example {path}/*.jsonl")
    for file in named_files(path):
        kind, compression = kind_of(file, (*ROW_KINDS, "txt"))
        if kind == "txt":
            raise DataError(f"{file}: is text without fields; use jsonl, csv or parquet")
        if kind == "parquet":
            yield from _located(parquet_rows(file), file, ": row ")
            continue
        read = _csv_rows if kind == "csv" else jsonl_rows
        with storage.open_binary(file, compression) as lines:
            yield from _located(read(lines), file, ":")


def _located(rows: NumberedRows, path: str, separator: str) -> Iterator[Row]:
    for number, values in rows:
        where = f"{path}{separator}{number}"
        if isinstance(values, RowError):
            raise DataError(f"{where}: {values}") from values
        yield Row(where, values)


def named_files(path: str) -> list[str]:
    """Return the file at a path, or those that a glob matches, sorted.

    Raises:
        DataError: there is none; for what may be a dataset's name it says how to write that.
    """
    if any(char in path for char in "*?["):
        files = storage.files_of(path)
        if not files:
            raise DataError(f"{path}: no file matches")
        return files
    if not storage.exists(path):
        hub = f"; for a dataset of the Hugging Face hub write {HUB_PREFIX}{path}"
        raise storage.missing(path, hub if path.count("/") == 1 else "")
    return [path]


def kind_of(path: str, kinds: Sequence[str] = TEXT_KINDS) -> tuple[str, str | None]:
    """Return the kind of a file and its compression, by its name; parquet is never compressed.

    Raises:
        DataError: it is of another kind.
    """
    stem, _, compression = path.lower().rpartition(".")
    if compression not in COMPRESSIONS:
        stem, compression = path.lower(), ""
    kind = stem.rpartition(".")[2]
    if kind not in kinds or (kind == "parquet" and compression):
        raise DataError(
            f"{path}: is of no known kind; known are {', '.join(kinds)}, all but parquet also "
            f"with {' or '.join(COMPRESSIONS)}"
        )
    return kind, COMPRESSIONS.get(compression)


def jsonl_rows(lines: Iterable[bytes]) -> NumberedRows:
    """Yield the objects on lines that are not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except RowError as error:
            yield number, error


def _csv_rows(file: BinaryIO) -> NumberedRows:
    """Yield the rows of a table as texts; ends at the first unusable one."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    while True:
        number = max(reader.line_num, 1) + 1  # the header is line 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            yield number, RowError(f"is not UTF-8: {error.reason}")
            return
        except csv.Error as error:
            yield number, RowError(f"is not CSV: {error}")
            return
        if None in values or None in values.values():
            names = ", ".join(reader.fieldnames or [])
            yield number, RowError(f"has more or fewer values than the header, {names}")
            return
        yield number, values


def parquet_rows(
    path: str, columns: list[str] | None = None, groups: range | None = None
) -> NumberedRows:
    """Yield the rows of a parquet file, of all columns and row groups or of some."""
    import pyarrow.parquet

    with storage.open_binary(path) as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        groups = groups or range(parquet.num_row_groups)
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in parquet.iter_batches(1024, row_groups=list(groups), columns=columns):
            for cells in zip(*batch.columns, strict=True):
                number += 1
                try:
                    values = [cell.as_py() for cell in cells]
                except UnicodeDecodeError as error:
                    yield number, RowError(f"is not UTF-8: {error.reason}")
                else:
                    yield number, dict(zip(batch.schema.names, values, strict=True))


def hub_rows(dataset: Iterable[dict[str, Any]], where: str) -> NumberedRows:
    """Yield the rows of a hub dataset.

    Raises:
        DataError: one cannot be had.
    """
    number = 0
    try:
        for number, values in enumerate(dataset, start=1):
            yield number, values
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(f"{where}: cannot be read after row {number}: {error}") from error


@functools.lru_cache
def load_hub(name: str, config: str, split: str) -> Any:
    """Open the dataset that `hf:NAME` names as a stream of rows.

    Raises:
        DataError: it cannot be had, or has no such configuration or split.
    """
    import datasets

    try:
        return datasets.load_dataset(
            name.removeprefix(HUB_PREFIX), config or None, split=split, streaming=True
        )
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error
