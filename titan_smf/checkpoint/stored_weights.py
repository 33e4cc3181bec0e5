"""The weights in a committed checkpoint: read by rows from its files as they are, and copied.

Rows are bytes here: what is compared, hashed and copied are bits, not numbers. At most one block of
rows is held at a time, whatever the size of a tensor and the number of ranks that saved it.

A shard is a safetensors file: the length of its header (8 bytes), the header (JSON: type, shape and
bytes of each tensor; where it stands in the whole one), the tensors' bytes without gaps.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from titan_smf.checkpoint.checkpointer import STATE, commit, open_checkpoint
from titan_smf.checkpoint.fingerprint import (
    RowBytes,
    digest_to_int,
    format_fingerprint,
    rows_per_block,
    sum_row_hashes,
    tensor_id,
)
from titan_smf.errors import CheckpointError
from titan_smf.storage import write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = "__metadata__"
PLACES = "DCP_SHARDING_INFO"
"""Entry of the header's metadata that says where its tensors stand in the whole ones."""
WEIGHTS = "model."
"""What the names of weights begin with."""
COPY_BYTES = 16 << 20
SECONDS_BETWEEN_REPORTS = 5.0

RowNumbers = npt.NDArray[np.int64]
Report = Callable[[str], None]


class Progress:
    """Report how much of some bytes is done, every few seconds."""

    def __init__(self, what: str, total: int, report: Report) -> None:
        self.what = what
        self.total = total
        self.report = report
        self.done = 0
        self.reported = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self.done += num_bytes
        if time.monotonic() - self.reported > SECONDS_BETWEEN_REPORTS:
            self.reported = time.monotonic()
            self.report(f"{self.what}: {self.done >> 20:,} of {self.total >> 20:,} MiB")


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that one file holds: a block of rows, or of columns."""

    file: Path
    begin: int
    """Its first byte in the file."""
    first_row: int
    num_rows: int
    first_column: int
    """In bytes of a whole row."""
    row_bytes: int

    def read(self, numbers: RowNumbers) -> RowBytes:
        """Return its rows with these numbers in the whole tensor; a run of them is one read."""
        rows = np.empty((len(numbers), self.row_bytes), np.uint8)
        runs = np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1)
        with self.file.open("rb") as file:
            for run in runs:
                file.seek(self.begin + int(numbers[run[0]] - self.first_row) * self.row_bytes)
                file.readinto(rows[run[0] : run[-1] + 1].data)
        return rows


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]

    @property
    def identity(self) -> bytes:
        """What its rows are hashed with."""
        return tensor_id(self.name, self.dtype, self.shape)

    @property
    def row_bytes(self) -> int:
        """Of a whole row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def rows(self, numbers: RowNumbers) -> RowBytes:
        """Return the rows with these numbers, reading no others."""
        rows = np.empty((len(numbers), self.row_bytes), np.uint8)
        for piece in self.pieces:
            here = (numbers >= piece.first_row) & (numbers < piece.first_row + piece.num_rows)
            if here.any():
                columns = slice(piece.first_column, piece.first_column + piece.row_bytes)
                rows[here, columns] = piece.read(numbers[here])
        return rows

    def blocks(self) -> Iterator[tuple[RowNumbers, RowBytes]]:
        """Yield all rows in blocks, with their numbers."""
        num_rows, step = self.shape[0], rows_per_block(self.row_bytes)
        for start in range(0, num_rows, step):
            numbers = np.arange(start, min(num_rows, start + step))
            yield numbers, self.rows(numbers)


class StoredWeights:
    """The weights of a checkpoint that is whole.

    Args:
        path: a `step-N` folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = open_checkpoint(path, {})
        self.shards = sorted(path.glob("*.safetensors"))
        found: dict[str, list[tuple[Path, int, dict[str, Any], list[int]]]] = {}
        for shard in self.shards:
            header, data = _read_header(shard)
            places = json.loads(header[METADATA][PLACES])
            for name, entry in _weights(header).items():
                begin = data + entry["data_offsets"][0]
                place = places[name]["saved_offsets"]
                found.setdefault(name, []).append((shard, begin, entry, place))
        self.tensors = {name: _tensor(name, parts) for name, parts in sorted(found.items())}

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(tensor.shape[0] * tensor.row_bytes for tensor in self.tensors.values())

    def fingerprint(self, report: Report) -> str:
        """Return the fingerprint of the weights; reads all of them."""
        total, progress = 0, Progress(f"{self.path}: fingerprint", self.num_bytes, report)
        for tensor in self.tensors.values():
            identity = tensor.identity
            for numbers, rows in tensor.blocks():
                if numbers[0] == 0:
                    total += digest_to_int(identity)
                total += sum_row_hashes(identity, numbers.tolist(), rows)
                progress.add(rows.nbytes)
        return format_fingerprint(total)

    def write(
        self,
        output: Path,
        changes: Mapping[str, tuple[RowNumbers, RowBytes]],
        about: dict[str, Any],
        report: Report,
    ) -> None:
        """Write the weights with some rows changed, as a committed checkpoint or not at all.

        It has the shards of this one: runs start from it on any number of ranks, none goes on.

        Args:
            output: a new folder.
            changes: by tensor the numbers of rows and their new bytes. These tensors are split by
                rows alone.
            about: what its `state.json` says beside what is said here.

        Raises:
            CheckpointError: it cannot be written.
        """
        staging = output.parent / f".staging-{output.name}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            self._copy(staging, changes, report)
            write_json(staging / STATE, self.state | {"states": {}} | about)
            commit(staging, output)
        except OSError as error:
            raise CheckpointError(f"{output}: cannot be written: {error}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _copy(
        self, folder: Path, changes: Mapping[str, tuple[RowNumbers, RowBytes]], report: Report
    ) -> None:
        """Write the shards into a folder that exists."""
        progress = Progress(f"{folder}: writing", self.num_bytes, report)
        for shard in self.shards:
            header, data = _read_header(shard)
            text, begins = _header_of_weights(header)
            with shard.open("rb") as source, (folder / shard.name).open("wb") as target:
                target.write(text)
                for name in begins:
                    begin, stop = header[name]["data_offsets"]
                    source.seek(data + begin)
                    for start in range(begin, stop, COPY_BYTES):
                        progress.add(target.write(source.read(min(COPY_BYTES, stop - start))))
                for name, (numbers, rows) in changes.items():
                    for piece in self.tensors[name].pieces:
                        if piece.file == shard:
                            _overwrite_rows(target, begins[name], piece, numbers, rows)
                target.flush()
                os.fsync(target.fileno())


def _tensor(name: str, parts: list[tuple[Path, int, dict[str, Any], list[int]]]) -> StoredTensor:
    """A tensor from its parts: file, first byte there, header entry, place in the whole."""
    ends = [map(sum, zip(place, part["shape"], strict=True)) for _, _, part, place in parts]
    shape = tuple(map(max, zip(*ends, strict=True)))
    dtype = DTYPES[parts[0][2]["dtype"]]
    pieces = []
    for file, begin, entry, place in parts:
        num_rows, *inner = entry["shape"]
        if num_rows and math.prod(inner):
            column = dtype.itemsize * place[1] * math.prod(shape[2:]) if inner else 0
            row_bytes = dtype.itemsize * math.prod(inner)
            pieces.append(Piece(file, begin, place[0], num_rows, column, row_bytes))
    return StoredTensor(name, dtype, shape, pieces)


def _read_header(shard: Path) -> tuple[dict[str, Any], int]:
    """A shard's header, and where its tensors' bytes begin."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _weights(header: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if name.startswith(WEIGHTS)}


def _header_of_weights(header: dict[str, Any]) -> tuple[bytes, dict[str, int]]:
    """What a file of a shard's weights alone begins with, and where each of them begins in it."""
    weights = sorted(_weights(header).items(), key=lambda item: item[1]["data_offsets"])
    written, begins, end = {METADATA: header[METADATA]}, {}, 0
    for name, entry in weights:
        begin, stop = entry["data_offsets"]
        begins[name] = end
        end += stop - begin
        written[name] = entry | {"data_offsets": [begins[name], end]}
    text = json.dumps(written, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + begin for name, begin in begins.items()}


def _overwrite_rows(
    file: BinaryIO, begin: int, piece: Piece, numbers: RowNumbers, rows: RowBytes
) -> None:
    """Write those of the rows that belong to a piece, whose copy in the file has this begin."""
    here = numbers - piece.first_row
    for index in np.flatnonzero((here >= 0) & (here < piece.num_rows)):
        file.seek(begin + int(here[index]) * piece.row_bytes)
        file.write(rows[index])
