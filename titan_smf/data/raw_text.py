"""Documents out of text files and hub datasets, cut into pieces that workers can read alone.

    txt                  documents between blank lines, or a whole file each
    jsonl                one JSON object a line; a field holds the text
    parquet              one row a document; a column holds the text
    hf:NAME              a dataset of the Hugging Face hub, or a local folder laid out like one

txt and jsonl may be compressed (.gz, .zst). Paths may be globs, folders and fsspec URLs.
"""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from titan_smf import storage
from titan_smf.data.fields import RowError, any_text_of, parse_json
from titan_smf.errors import ConfigError, DataError

HUB_PREFIX = "hf:"
KINDS = ("txt", "jsonl", "parquet")
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
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


def plan_pieces(inputs: list[str], options: TextOptions, piece_bytes: int) -> list[Piece]:
    """Cut the inputs into pieces of about `piece_bytes`, in the order given, globs sorted.

    Raises:
        DataError: an input does not exist, is of no known kind, or lacks the column.
    """
    pieces: list[Piece] = []
    for given in inputs:
        if given.startswith(HUB_PREFIX):
            num_files = load_hub(given, options).num_shards
            pieces += [Piece("hub", given, i, i + 1, 0) for i in range(num_files)]
            continue
        for path in _expand(given):
            kind, compression = kind_of(path)
            if kind == "parquet":
                pieces += _plan_parquet(path, options, piece_bytes)
            elif compression or (kind == "txt" and options.split_text == "none"):
                pieces.append(Piece(kind, path, 0, TO_THE_END, storage.size_of(path)))
            else:
                starts = _piece_starts(path, kind, piece_bytes)
                pieces += [Piece(kind, path, a, b, b - a) for a, b in itertools.pairwise(starts)]
    return pieces


def kind_of(path: str) -> tuple[str, str | None]:
    """The kind of a file and its compression, by its name."""
    found = _kind(path)
    if found is None:
        raise DataError(
            f"{path}: is of no known kind; known are {', '.join(KINDS)}, the first two also with "
            f"{' or '.join(COMPRESSIONS)}"
        )
    return found


def _kind(path: str) -> tuple[str, str | None] | None:
    stem, _, compression = path.lower().rpartition(".")
    if compression not in COMPRESSIONS:
        stem, compression = path.lower(), ""
    kind = stem.rpartition(".")[2]
    if kind not in KINDS or (kind == "parquet" and compression):
        return None
    return kind, COMPRESSIONS.get(compression)


def read_documents(piece: Piece, options: TextOptions) -> Iterator[str | Rejected]:
    """The documents of a piece, in order; what cannot be used as `Rejected`."""
    if piece.kind == "hub":
        yield from _read_hub(piece, options)
    elif piece.kind == "parquet":
        yield from _read_parquet(piece, options)
    else:
        read = _read_jsonl if piece.kind == "jsonl" else _read_txt
        with storage.open_binary(piece.path, kind_of(piece.path)[1]) as file:
            yield from read(io.BufferedReader(file), piece, options)  # type: ignore[type-var]


def _expand(given: str) -> list[str]:
    """The files that a path, folder or glob stands for, sorted."""
    if not storage.is_folder(given):
        return named_files(given)
    files = [path for path in storage.files_of(given) if _kind(path)]
    if not files:
        raise DataError(f"{given}: holds no file of a known kind ({', '.join(KINDS)})")
    return files


def named_files(given: str) -> list[str]:
    """The file of a path, or those that a glob matches, sorted.

    Raises:
        DataError: there is none; for what may be a dataset's name it says how to write that.
    """
    if any(char in given for char in "*?["):
        files = storage.files_of(given)
        if not files:
            raise DataError(f"{given}: no file matches")
        return files
    if not storage.exists(given):
        hub = f"; for a dataset of the Hugging Face hub write {HUB_PREFIX}{given}"
        raise storage.missing(given, hub if given.count("/") == 1 else "")
    return [given]


def _piece_starts(path: str, kind: str, piece_bytes: int) -> list[int]:
    """Where pieces of a plain file start, at first lines of documents, and its end."""
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


def _lines(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines of a piece, numbered from 0 within it."""
    if piece.start:  # compressed files are read from the start and may not be able to seek
        file.seek(piece.start)
    position = piece.start
    for number, line in enumerate(file):
        yield number, line
        position += len(line)
        if piece.stop != TO_THE_END and position >= piece.stop:
            return


def _rejected_line(piece: Piece, number: int, cause: str) -> Rejected:
    """A rejected line with its number in the file; the lines before the piece are counted now."""
    before, left = 0, piece.start
    if left:
        with storage.open_binary(piece.path) as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                before += block.count(b"\n")
                left -= len(block)
    return Rejected(f"{piece.path}:{before + number + 1}", cause)


def _read_txt(file: BinaryIO, piece: Piece, options: TextOptions) -> Iterator[str | Rejected]:
    whole_file = options.split_text == "none"
    document: list[bytes] = []
    first_line = 0
    for number, line in _lines(file, piece):
        if line.strip() or whole_file:
            if not document:
                first_line = number
            document.append(line)
        elif document:
            yield _decode_txt(document, piece, first_line)
            document = []
    if document:
        yield _decode_txt(document, piece, first_line)


def _decode_txt(lines: list[bytes], piece: Piece, first_line: int) -> str | Rejected:
    content = b"".join(lines).removesuffix(b"\n").removesuffix(b"\r")
    try:
        return content.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        return _rejected_line(piece, line, f"is not UTF-8: {error.reason}")


def _read_jsonl(file: BinaryIO, piece: Piece, options: TextOptions) -> Iterator[str | Rejected]:
    for number, line in _lines(file, piece):
        if not line.strip():
            continue
        try:
            document = _text_of(parse_json(line), options.field)
        except RowError as error:
            yield _rejected_line(piece, number, str(error))
        else:
            yield document


def _text_of(row: dict[str, Any], field: str) -> str:
    """The text of a JSON object or row."""
    if field not in row:
        others = ", ".join(row) or "none"
        raise RowError(f"has no field {field!r}, but {others} (choose by --field)")
    return any_text_of(row[field], f"field {field!r}")


def _plan_parquet(path: str, options: TextOptions, piece_bytes: int) -> list[Piece]:
    """Pieces of whole row groups."""
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


def _read_parquet(piece: Piece, options: TextOptions) -> Iterator[str | Rejected]:
    import pyarrow.parquet

    with storage.open_binary(piece.path) as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in parquet.iter_batches(row_groups=groups, columns=[options.field]):
            for value in batch.column(0):
                row += 1
                try:
                    document = _text_of({options.field: value.as_py()}, options.field)
                except UnicodeDecodeError as error:
                    yield Rejected(f"{piece.path}: row {row}", f"is not UTF-8: {error.reason}")
                except RowError as error:
                    yield Rejected(f"{piece.path}: row {row}", str(error))
                else:
                    yield document


@functools.lru_cache
def load_hub(name: str, options: TextOptions) -> Any:
    """The streamed data set that `hf:NAME` names; of `options`, `hub_config` and `hub_split` count.

    Raises:
        DataError: it cannot be had, or has no such configuration or split.
    """
    import datasets

    try:
        return datasets.load_dataset(
            name.removeprefix(HUB_PREFIX),
            options.hub_config or None,
            split=options.hub_split,
            streaming=True,
        )
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error


def _read_hub(piece: Piece, options: TextOptions) -> Iterator[str | Rejected]:
    """One file of a hub dataset."""
    dataset = load_hub(piece.path, options)
    rows = dataset.shard(num_shards=dataset.num_shards, index=piece.start)
    where = f"{piece.path}: file {piece.start + 1} of {dataset.num_shards}"
    for row, value in numbered(rows, where):
        try:
            document = _text_of(value, options.field)
        except RowError as error:
            yield Rejected(f"{where}, row {row}", str(error))
        else:
            yield document


def numbered(rows: Iterable[dict[str, Any]], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a hub dataset, counted from 1.

    Raises:
        DataError: one cannot be had.
    """
    row = 0
    try:
        for row, values in enumerate(rows, start=1):
            yield row, values
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(f"{where}: cannot be read after row {row}: {error}") from error
