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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from titan_smf.checkpoint.checkpointer import STATE, commit, find_checkpoint, open_checkpoint
from titan_smf.checkpoint.fingerprint import (
    RowBytes,
    format_fingerprint,
    rows_per_block,
    sum_row_hashes,
    tensor_id,
)
from titan_smf.errors import CheckpointError
from titan_smf.progress import ProgressTimer
from titan_smf.storage import write_json

METADATA = "__metadata__"
PLACES = "DCP_SHARDING_INFO"
"""Entry of the header's metadata that says where its tensors stand in the whole ones."""
WEIGHTS = "model."
"""What the names of weights begin with."""

RowNumbers = npt.NDArray[np.int64]
Rows = tuple[RowNumbers, RowBytes]
"""Numbers of rows in a tensor, and their bytes."""
Report = Callable[[str], None]


class Progress:
    """Reports how much of some bytes is done, every few seconds."""

    def __init__(self, what: str, total: int, report: Report) -> None:
        self.what = what
        self.total = total
        self.report = report
        self.done = 0
        self.timer = ProgressTimer()

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self.done += num_bytes
        if self.timer.due():
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

    @property
    def columns(self) -> slice:
        """Its bytes in a whole row."""
        return slice(self.first_column, self.first_column + self.row_bytes)

    def read(self, rows: RowNumbers | slice) -> RowBytes:
        """Return some of its rows, counted from its first one, reading no others."""
        shape = (self.num_rows, self.row_bytes)
        return np.array(np.memmap(self.file, np.uint8, "r", self.begin, shape)[rows])

    def blocks(self, changed: Rows | None) -> Iterator[RowBytes]:
        """Yield its rows in blocks, with the changed ones (of the whole tensor) put in."""
        step = rows_per_block(self.row_bytes)
        for start in range(0, self.num_rows, step):
            block = self.read(slice(start, start + step))
            if changed is not None:
                numbers, rows = changed
                places = numbers - (self.first_row + start)
                here = (places >= 0) & (places < len(block))
                block[places[here]] = rows[here, self.columns]
            yield block


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]

    @property
    def row_bytes(self) -> int:
        """The size of a whole row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def rows(self, numbers: RowNumbers) -> RowBytes:
        """Return the rows with these numbers, reading no others."""
        rows = np.empty((len(numbers), self.row_bytes), np.uint8)
        for piece in self.pieces:
            here = (numbers >= piece.first_row) & (numbers < piece.first_row + piece.num_rows)
            if here.any():
                rows[here, piece.columns] = piece.read(numbers[here] - piece.first_row)
        return rows

    def blocks(self) -> Iterator[Rows]:
        """Yield all rows in blocks."""
        num_rows, step = self.shape[0], rows_per_block(self.row_bytes)
        for start in range(0, num_rows, step):
            numbers = np.arange(start, min(num_rows, start + step))
            yield numbers, self.rows(numbers)


class StoredWeights:
    """The weights of a checkpoint that is whole.

    Args:
        path: a `step-N` folder, or a run's or its checkpoints folder for the newest checkpoint.
        report: called with lines of progress where much is read or written.

    Raises:
        CheckpointError: it is missing or damaged.
    """

    def __init__(self, path: Path, report: Report) -> None:
        self.report = report
        self.path = find_checkpoint(path, setting="")
        self.state = open_checkpoint(self.path, {})
        self.shards = sorted(self.path.glob("*.safetensors"))
        stored = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        self.tensors: dict[str, StoredTensor] = {}
        for name, whole in sorted(stored.items()):
            if name.startswith(WEIGHTS):
                dtype, shape = whole.properties.dtype, tuple(whole.size)  # type: ignore[union-attr]
                self.tensors[name] = StoredTensor(name, dtype, shape, [])
        for shard in self.shards:
            header, data = _read_header(shard)
            places = json.loads(header[METADATA][PLACES])
            for name, entry in _weights(header):
                place = places[name]["saved_offsets"]
                begin = data + entry["data_offsets"][0]
                piece = _piece(self.tensors[name], shard, begin, entry["shape"], place)
                if piece.num_rows and piece.row_bytes:
                    self.tensors[name].pieces.append(piece)

    @property
    def num_bytes(self) -> int:
        """The size of all weights."""
        return sum(tensor.shape[0] * tensor.row_bytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights; reads all of them."""
        total, progress = 0, Progress(f"{self.path}: fingerprint", self.num_bytes, self.report)
        for tensor in self.tensors.values():
            identity = tensor_id(tensor.name, tensor.dtype, tensor.shape)
            for numbers, rows in tensor.blocks():
                total += sum_row_hashes(identity, numbers.tolist(), rows)
                progress.add(rows.nbytes)
        return format_fingerprint(total)

    def write(
        self, output: Path, changes: Callable[[str], Rows | None], about: dict[str, Any]
    ) -> None:
        """Write the weights with some rows changed, as a committed checkpoint or not at all.

        It has the shards of this one: runs start from it on any number of ranks, none goes on.

        Args:
            output: a new folder.
            changes: gives the new rows of a tensor by name; None if it stays.
            about: further entries of its `state.json`.

        Raises:
            CheckpointError: it cannot be written.
        """
        staging = output.parent / f".staging-{output.name}"
        progress = Progress(f"{output}: writing", self.num_bytes, self.report)
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for shard in self.shards:
                self._copy(shard, staging / shard.name, changes, progress)
            write_json(staging / STATE, self.state | {"states": {}} | about)
            commit(staging, output)
        except OSError as error:
            raise CheckpointError(f"{output}: cannot be written: {error}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _copy(
        self, shard: Path, path: Path, changes: Callable[[str], Rows | None], progress: Progress
    ) -> None:
        """Write a copy of a shard's weights, with changed rows, that is on the disk at the end."""
        header, _ = _read_header(shard)
        with path.open("wb") as target:
            target.write(_header_of_weights(header))
            for name, _ in _weights(header):
                for piece in self.tensors[name].pieces:
                    if piece.file == shard:
                        for block in piece.blocks(changes(name)):
                            progress.add(target.write(block.data))
            target.flush()
            os.fsync(target.fileno())


def _piece(
    whole: StoredTensor, shard: Path, begin: int, shape: list[int], place: list[int]
) -> Piece:
    """Return the piece of a tensor with a shape and place (offsets) in the whole."""
    size = whole.dtype.itemsize
    column = size * place[1] * math.prod(whole.shape[2:]) if shape[1:] else 0
    return Piece(shard, begin, place[0], shape[0], column, size * math.prod(shape[1:]))


def _read_header(shard: Path) -> tuple[dict[str, Any], int]:
    """Return a shard's header, and where its tensors' bytes begin."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _weights(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries of weights, in the order of their bytes."""
    weights = [(name, entry) for name, entry in header.items() if name.startswith(WEIGHTS)]
    return sorted(weights, key=lambda item: item[1]["data_offsets"])


def _header_of_weights(header: dict[str, Any]) -> bytes:
    """Return how a file of a shard's weights alone begins: they follow without gaps."""
    written, end = {METADATA: header[METADATA]}, 0
    for name, entry in _weights(header):
        begin, stop = entry["data_offsets"]
        written[name] = entry | {"data_offsets": [end, end + stop - begin]}
        end += stop - begin
    text = json.dumps(written, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
