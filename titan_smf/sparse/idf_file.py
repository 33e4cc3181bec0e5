"""`idf.safetensors`: df and counts of every slot, and what they were counted with.

    df       (tables * N,) int32   documents that accessed the slot
    counts   (tables * N,) int64   accesses to the slot
    header   `idf`, the JSON of `IdfMetadata` and the format's version; one entry, because
             safetensors writes several in any order and equal counts shall give equal files

A safetensors file is the length of its header, the header (JSON), and the tensors' bytes. Reading
it by these means, a rank gets its own rows from any file system without fetching the others'.
"""

import dataclasses
import itertools
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from titan_smf import storage
from titan_smf.errors import DataError, IdfError
from titan_smf.sparse.accesses import OwnedSlots
from titan_smf.sparse.document_frequency import Background

FORMAT = 1
METADATA = "idf"
PARTIAL_SUFFIX = ".partial"
"""Of the file beside the final one, from which a count that was stopped goes on."""
LONGEST_HEADER = 100_000_000
"""In bytes; safetensors' own limit."""
MODEL_FIELDS = {
    "slots": "slots in a table",
    "tables": "value tables",
    "memory_layers": "memory layers",
    "tokenizer_fingerprint": "tokenizer",
    "addressing_fingerprint": "addressing fingerprint (the model's keys and queries)",
}
"""Of `IdfModel`, in words."""
COUNT_FIELDS = ("data", "batch_size", "seq_len")
"""Of `IdfMetadata`: what makes the documents."""
TENSORS: dict[str, tuple[str, np.dtype[Any]]] = {
    "df": ("I32", np.dtype("<i4")),
    "counts": ("I64", np.dtype("<i8")),
}


@dataclass(frozen=True)
class IdfModel:
    """What must be equal for counts to fit a model."""

    slots: int
    """N, of one table."""
    tables: int
    memory_layers: list[int]
    tokenizer: str
    """Its name, for messages: the fingerprint decides."""
    tokenizer_fingerprint: str
    addressing_fingerprint: str
    """Of `document_frequency.addressing_fingerprint`."""


@dataclass(frozen=True)
class IdfMetadata:
    """What a file says of its counts."""

    model: IdfModel
    data: str
    """Where the documents came from, in words."""
    batch_size: int
    """Sequences in a document."""
    seq_len: int
    """Tokens in a sequence."""
    ranges: list[list[int]]
    """The documents counted: `first <= number < stop` for each [first, stop], ascending."""
    complete: bool
    """Whether all documents were counted that were to be; false in a partial file, and where some
    between the ranges are not counted."""
    accesses: int = 0
    """The sum of `counts`; `save_idf` sets it."""
    slots_used: int = 0
    """Slots that occur in at least one document; `save_idf` sets it."""

    @property
    def documents(self) -> int:
        """How many documents were counted."""
        return sum(stop - first for first, stop in self.ranges)


def save_idf(path: str, df: Tensor, counts: Tensor, metadata: IdfMetadata) -> IdfMetadata:
    """Write a file that is complete or absent; returns the metadata as written.

    Args:
        path: a path or fsspec URL.
        df, counts: (tables * N,), of all slots.
    """
    assert len(df) == len(counts) == metadata.model.slots * metadata.model.tables
    used = int((df > 0).sum())
    metadata = dataclasses.replace(metadata, accesses=int(counts.sum()), slots_used=used)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(metadata)})
    tensors = {"df": df.to(torch.int32), "counts": counts.to(torch.int64)}
    content = safetensors.torch.save(tensors, {METADATA: text})
    storage.write_bytes(path, content)
    return metadata


def read_metadata(path: str) -> IdfMetadata:
    """Read what a file says of its counts, without them.

    Raises:
        IdfError: it is missing, torn, or no such file.
    """
    with _open_idf(path) as (_, metadata, _):
        return metadata


def load_idf(path: str, owned: OwnedSlots, device: torch.device | str = "cpu") -> Background:
    """Read the counts of this rank's slots, and no others.

    Raises:
        IdfError: it is missing, torn, or no such file; or of another number of slots.
    """
    with _open_idf(path) as (file, metadata, begins):
        model = metadata.model
        if (model.slots, model.tables) != (owned.num_slots, owned.num_tables):
            here = f"this model {owned.num_tables} of {owned.num_slots}"
            raise _refusal(path, f"has {model.tables} tables of {model.slots} slots, {here}")
        df, counts = (_read_rows(file, begins[name], TENSORS[name][1], owned) for name in TENSORS)
    documents = metadata.documents
    impossible = (df < 0) | (df > documents) | (counts < df) | ((df == 0) & (counts > 0))
    if impossible.any():
        raise _refusal(path, f"damaged, it has counts that {documents} documents cannot have")
    return Background(owned, df.to(device), counts.to(device), documents, metadata.accesses)


def check_idf(path: str, metadata: IdfMetadata, expected: IdfModel) -> None:
    """Check that the counts fit the model `expected` and are complete.

    Raises:
        IdfError: they do not; it names every difference and the command that counts anew, or
            completes the count.
    """
    if differences := _differences(metadata.model, expected, MODEL_FIELDS):
        raise _refusal(path, f"does not fit this run: {differences}")
    if metadata.documents == 0:
        raise _refusal(path, "counts no document, every slot looks unused")
    if lacking := what_is_missing(metadata):
        command = _command(path.removesuffix(PARTIAL_SUFFIX))
        raise IdfError(f"{path}: is not complete: {lacking}; {command}")


def what_is_missing(metadata: IdfMetadata) -> str:
    """Return what an incomplete file lacks and what to do about it; "" for a complete one."""
    if metadata.complete:
        return ""
    if gaps := [[a[1], b[0]] for a, b in itertools.pairwise(metadata.ranges)]:
        first, stop = gaps[0]
        return (
            f"it lacks the documents {', '.join(f'{a} to {b - 1}' for a, b in gaps)}; count them "
            f"(--idf.first_batch {first} --idf.num_batches {stop - first}) into a file of their "
            "own and merge the two"
        )
    return (
        f"it holds {metadata.documents} documents of a count that was stopped; start the count "
        "again with its settings, it goes on from there"
    )


def check_same_count(path: str, metadata: IdfMetadata, expected: IdfMetadata) -> None:
    """Check that both count documents of the same kind, for going on from a file or merging.

    Raises:
        IdfError: they do not; it names every difference.
    """
    differences = (
        _differences(metadata.model, expected.model, MODEL_FIELDS),
        _differences(metadata, expected, {name: name for name in COUNT_FIELDS}),
    )
    if any(differences):
        raise IdfError(
            f"{path}: counts other documents: {'; '.join(filter(None, differences))}; count with "
            "the settings of the other part, or remove the file to count anew"
        )


def merge_idf(paths: Sequence[str], path: str) -> IdfMetadata:
    """Add up the files of independent jobs into `path`; as if one job had counted all documents.

    The sum is complete if no document is missing between those counted, and the job that counted
    the last one counted all that it was to.

    Raises:
        IdfError: a file cannot be used, counts with other settings, or counts a document that
            another one counts too.
    """
    parts = [(part, read_metadata(part)) for part in paths]
    first = parts[0][1]
    for part, metadata in parts:
        check_same_count(part, metadata, first)
    ranges = _merge_ranges(
        [(start, stop, part) for part, m in parts for start, stop in m.ranges if start < stop]
    )
    everything = OwnedSlots(first.model.slots, 0, first.model.slots, first.model.tables)
    df = torch.zeros(len(everything), dtype=torch.int32)
    counts = df.long()
    for part in paths:
        counted = load_idf(part, everything)
        df += counted.df
        counts += counted.counts
    last = max((metadata for _, metadata in parts), key=lambda m: max(m.ranges, default=[0, 0]))
    complete = last.complete and len(ranges) <= 1
    merged = dataclasses.replace(first, ranges=ranges, complete=complete)
    return save_idf(path, df, counts, merged)


def _merge_ranges(ranges: list[tuple[int, int, str]]) -> list[list[int]]:
    """Return ranges of documents in order, neighbours made one, from (first, stop, file)."""
    joined: list[list[int]] = []
    before = ""
    for start, stop, path in sorted(ranges):
        if joined and start < joined[-1][1]:
            raise IdfError(
                f"{path}: counts documents {start} to {min(stop, joined[-1][1]) - 1}, which "
                f"{before} counts too; merge files of different documents"
            )
        if joined and start == joined[-1][1]:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
        before = path
    return joined


def _differences(got: Any, want: Any, fields: dict[str, str]) -> str:
    """Return in words which of the fields differ; "" for none."""

    def shown(owner: Any, name: str) -> str:
        if name == "tokenizer_fingerprint":
            return f"{owner.tokenizer} with fingerprint {owner.tokenizer_fingerprint}"
        return repr(owner.data) if name == "data" else str(getattr(owner, name))

    return "; ".join(
        f"{words}: the file has {shown(got, name)}, not {shown(want, name)}"
        for name, words in fields.items()
        if getattr(got, name) != getattr(want, name)
    )


def _refusal(path: str, problem: str) -> IdfError:
    return IdfError(f"{path}: {problem}; {_command(path)}")


def _command(path: str) -> str:
    return (
        "count the background of this run's model, CHECKPOINT being the one it starts from: "
        "torchrun --nproc_per_node=auto tools/compute_idf.py "
        "--job.config train_configs/compute_idf.toml "
        f"--checkpoint.initial_load_path CHECKPOINT --idf.path {shlex.quote(path)}"
    )


@contextmanager
def _open_idf(path: str) -> Iterator[tuple[BinaryIO, IdfMetadata, dict[str, int]]]:
    """Yield the open file, its metadata, and the byte at which each tensor begins."""
    try:
        if not storage.exists(path):
            raise storage.missing(path)
        with storage.open_binary(path) as file:
            yield file, *_read_header(file, path)
    except DataError as error:
        raise IdfError(f"{error}; {_command(path)}") from error


def _read_header(file: BinaryIO, path: str) -> tuple[IdfMetadata, dict[str, int]]:
    torn = _refusal(path, "is torn, bytes are missing or too many")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    data = 8 + length
    if size < 8 or data > size or length > LONGEST_HEADER:
        raise torn
    begins, stop = {}, 0
    try:
        header = json.loads(file.read(length))
        fields = json.loads(header["__metadata__"][METADATA])
        version = fields.pop("format")
        if version != FORMAT:
            raise _refusal(path, f"has format {version}, not {FORMAT}")
        model = IdfModel(**fields.pop("model"))
        metadata = IdfMetadata(model, **fields)
        num_slots = model.slots * model.tables
        for name, (type_name, dtype) in TENSORS.items():
            entry = header[name]
            begin, end = entry["data_offsets"]
            found = entry["dtype"], entry["shape"], end - begin
            if found != (type_name, [num_slots], num_slots * dtype.itemsize):
                raise ValueError(f"{name} is {found}")
            begins[name], stop = data + begin, max(stop, data + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is no file of document frequencies, or a damaged one ({error!r})"
        raise _refusal(path, problem) from error
    if size != stop:
        raise torn
    return metadata, begins


def _read_rows(file: BinaryIO, begin: int, dtype: np.dtype[Any], owned: OwnedSlots) -> Tensor:
    """Return this rank's rows of each table of a tensor that begins at a byte of the file."""
    tables = []
    for table in range(owned.num_tables):
        file.seek(begin + (table * owned.num_slots + owned.start) * dtype.itemsize)
        content = file.read((owned.stop - owned.start) * dtype.itemsize)
        tables.append(np.frombuffer(content, dtype))
    return torch.from_numpy(np.concatenate(tables).astype(dtype.newbyteorder("="), copy=False))
