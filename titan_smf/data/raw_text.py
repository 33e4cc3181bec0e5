"""Documents out of text files and hub datasets, cut into pieces that workers can read alone.

    txt                  documents between blank lines, or a whole file each
    jsonl                one JSON object a line; a field holds the text
    parquet              one row a document; a column holds the text
    hf:NAME              a dataset of the Hugging Face hub, or a local folder laid out like one

txt and jsonl may be compressed (.gz, .zst). Paths may be globs, folders and fsspec URLs.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from titan_smf import storage
from titan_smf.data.fields import RowError, any_text_of
from titan_smf.data.rows import (
    HUB_PREFIX,
    TEXT_KINDS,
    NumberedRows,
    hub_rows,
    jsonl_rows,
    kind_of,
    load_hub,
    named_files,
    parquet_rows,
)
from titan_smf.errors import ConfigError, DataError

TO_THE_END = -1


@dataclass(frozen=True)
class TextOptions:
    """How documents are found in the inputs."""

    field: str = "text"
    """The jsonl field or the column that holds the text."""
    split_text: str = "blank-lines"
    """`blank-lines`: a txt file is cut into documents at blank lines; `none`: it is one."""
    hub_config: str = ""
    """The configuration of a hub dataset; empty for its default."""
    hub_split: str = "train"
    """The split of a hub dataset."""

    def __post_init__(self) -> None:
        if self.split_text not in ("blank-lines", "none"):
            raise ConfigError("split_text", self.split_text, "blank-lines, none")


@dataclass(frozen=True)
class Piece:
    """A part of one input that holds whole documents.

    `start` and `stop` count bytes (txt, jsonl), row groups (parquet) or files (hub).
    """

    kind: str
    path: str
    start: int
    stop: int
    size: int
    """Bytes to read, for the time left; 0 where unknown."""


class Rejected(NamedTuple):
    """A line or row that is no document."""

    where: str
    cause: str


def plan_pieces(
    inputs: list[str], options: TextOptions, piece_bytes: int = sys.maxsize
) -> list[Piece]:
    """Cut the inputs into pieces, in the order given, globs sorted.

    Args:
        piece_bytes: about how large a piece is; by default each file is one.

    Raises:
        DataError: an input does not exist, is of no known kind, or lacks the column.
    """
    pieces: list[Piece] = []
    for given in inputs:
        if given.startswith(HUB_PREFIX):
            num_files = load_hub(given, options.hub_config, options.hub_split).num_shards
            pieces += [Piece("hub", given, i, i + 1, 0) for i in range(num_files)]
            continue
        for path in _files_in(given) if storage.is_folder(given) else named_files(given):
            kind, compression = kind_of(path)
            if kind == "parquet":
                pieces += _plan_parquet(path, options, piece_bytes)
            elif compression or (kind == "txt" and options.split_text == "none"):
                pieces.append(Piece(kind, path, 0, TO_THE_END, storage.size_of(path)))
            else:
                starts = _piece_starts(path, kind, piece_bytes)
                pieces += [Piece(kind, path, a, b, b - a) for a, b in itertools.pairwise(starts)]
    return pieces


def _files_in(folder: str) -> list[str]:
    """Return the files of a folder that are of a known kind, sorted."""
    files = []
    for path in storage.files_of(folder):
        with suppress(DataError):
            kind_of(path)
            files.append(path)
    if not files:
        raise DataError(f"{folder}: holds no file of a known kind ({', '.join(TEXT_KINDS)})")
    return files


def _piece_starts(path: str, kind: str, piece_bytes: int) -> list[int]:
    """Return where pieces of a plain file start, at first lines of documents, and its end."""
    size = storage.size_of(path)
    starts = [0] if size else []
    with storage.open_binary(path) as file:
        while starts and starts[-1] + piece_bytes < size:
            position = file.seek(starts[-1] + piece_bytes)
            position += len(file.readline())  # the rest of a line, of the piece before
            if kind == "txt":
                while (line := file.readline()).strip():
                    position += len(line)
            if position >= size:
                break
            starts.append(position)
    return [*starts, size]


def _plan_parquet(path: str, options: TextOptions, piece_bytes: int) -> list[Piece]:
    """Cut a parquet file into pieces of whole row groups."""
    import pyarrow
    import pyarrow.parquet

    with storage.open_binary(path) as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        schema, metadata = parquet.schema_arrow, parquet.metadata
    if options.field not in schema.names:
        columns = ", ".join(schema.names)
        raise DataError(f"{path}: has no column {options.field!r}, but {columns} (--field)")
    column_type = schema.field(options.field).type
    if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
        raise DataError(f"{path}: column {options.field!r} holds {column_type}, not text")

    pieces: list[Piece] = []
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= piece_bytes or group + 1 == metadata.num_row_groups:
            pieces.append(Piece("parquet", path, start, group + 1, size))
            start, size = group + 1, 0
    return pieces


def read_documents(pieces: Iterable[Piece], options: TextOptions) -> Iterator[str | Rejected]:
    """Yield the documents of the pieces, in order; what cannot be used as `Rejected`."""
    for piece in pieces:
        rows, place_of = _open_piece(piece, options)
        for number, row in rows:
            try:
                yield _text_of(row, options.field)
            except RowError as error:
                yield Rejected(place_of(number), str(error))


def _text_of(row: dict[str, Any] | RowError, field: str) -> str:
    if isinstance(row, RowError):
        raise row
    if field not in row:
        others = ", ".join(row) or "none"
        raise RowError(f"has no field {field!r}, but {others} (choose by --field)")
    return any_text_of(row[field], f"field {field!r}")


def _open_piece(piece: Piece, options: TextOptions) -> tuple[NumberedRows, Callable[[int], str]]:
    """Return the rows of a piece, and the function that names the place of a row by its number."""
    if piece.kind == "hub":
        dataset = load_hub(piece.path, options.hub_config, options.hub_split)
        file = f"{piece.path}: file {piece.start + 1} of {dataset.num_shards}"
        rows = dataset.shard(num_shards=dataset.num_shards, index=piece.start)
        return hub_rows(rows, file), lambda number: f"{file}, row {number}"
    if piece.kind == "parquet":
        groups = range(piece.start, piece.stop)
        rows = parquet_rows(piece.path, [options.field], groups)
        return rows, lambda number: f"{piece.path}: row {number}"
    rows = jsonl_rows(_lines(piece)) if piece.kind == "jsonl" else _txt_rows(piece, options)
    return rows, partial(_place_of_line, piece)


def _lines(piece: Piece) -> Iterator[bytes]:
    with storage.open_binary(piece.path, kind_of(piece.path)[1]) as file:
        if piece.start:  # compressed files are read from the start and may not be able to seek
            file.seek(piece.start)
        position = piece.start
        for line in file:
            yield line
            position += len(line)
            if piece.stop != TO_THE_END and position >= piece.stop:
                return


def _place_of_line(piece: Piece, number: int) -> str:
    """Name a line of a piece by its number in the file; counts the lines before only now."""
    left = piece.start
    if left:
        with storage.open_binary(piece.path) as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                number += block.count(b"\n")
                left -= len(block)
    return f"{piece.path}:{number}"


def _txt_rows(piece: Piece, options: TextOptions) -> NumberedRows:
    """Yield documents, runs of lines that are not blank, as rows with one field."""

    def is_text(numbered: tuple[int, bytes]) -> bool:
        return options.split_text == "none" or bool(numbered[1].strip())

    for within, group in itertools.groupby(enumerate(_lines(piece), start=1), is_text):
        if not within:
            continue
        numbers, lines = zip(*group, strict=True)
        content = b"".join(lines).removesuffix(b"\n").removesuffix(b"\r")
        try:
            text = content.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
        except UnicodeDecodeError as error:
            bad_line = numbers[0] + content[: error.start].count(b"\n")
            yield bad_line, RowError(f"is not UTF-8: {error.reason}")
        else:
            yield numbers[0], {options.field: text}
