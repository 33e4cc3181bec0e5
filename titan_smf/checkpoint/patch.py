"""`patch.safetensors`: the rows that a sparse run changed, and which model they belong to.

    P rows changed, N slots of a table, V value dim

    ids      (P,) int64            slots, ascending: table * N + slot
    old      (P, V) values' dtype  before the run
    new      (P, V) values' dtype  after it
    header   `patch`, the JSON of `PatchMetadata` and the format's version

The size is that of the rows, twice, and does not depend on N. The fingerprints of the model before
and after are in the header; since a fingerprint follows from old and new rows (`fingerprint.py`),
a patch proves itself: one that is damaged does not lead from its base to its result.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from titan_smf import __version__, storage
from titan_smf.checkpoint.fingerprint import bytes_of_rows, moved, rows_sum, table_name, tensor_id
from titan_smf.errors import DataError, PatchError

FORMAT = 1
METADATA = "patch"
EXAMPLES = 5
"""Slots that a message names at most."""

OverlapPolicy = Literal["refuse", "last", "sum"]


@dataclass(frozen=True)
class LineageStep:
    """One run that changed rows."""

    configuration: str
    """SHA-256 of its resolved configuration; empty if that is not known."""
    steps: int
    """Training steps."""
    data: str
    """What it learned, in words."""
    parent: str
    """Fingerprint of the weights it started from."""


@dataclass(frozen=True)
class PatchMetadata:
    """What a patch says of its rows."""

    base: str
    """Fingerprint of the weights it applies to."""
    result: str
    """Fingerprint of the weights it leads to."""
    slots: int
    """N, of one table."""
    tables: int
    v_dim: int
    dtype: str
    """Of the values: float32, bfloat16 ..."""
    lineage: list[LineageStep]
    """The runs behind it, oldest first. Merged patches of one base have the same parent."""
    created_by: str = f"titan_smf {__version__}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Patch:
    """Changed rows with their values before and after, on the CPU."""

    ids: Tensor
    """(P,) int64, ascending, each once."""
    old: Tensor
    """(P, V)"""
    new: Tensor
    """(P, V), each row different from the old one."""
    metadata: PatchMetadata

    def rows_of(self, table: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns slots (within the table), old and new values of `start <= slot < stop`."""
        first = table * self.metadata.slots
        begin, end = torch.searchsorted(
            self.ids, torch.tensor([first + start, first + stop])
        ).tolist()
        return self.ids[begin:end] - first, self.old[begin:end], self.new[begin:end]


def make_patch(
    ids: Tensor,
    old: Tensor,
    new: Tensor,
    base: str,
    slots: int,
    tables: int,
    lineage: Sequence[LineageStep],
) -> Patch:
    """Returns the patch of rows in ascending order, less those that did not change.

    Args:
        ids, old, new: (P,), (P, V), (P, V).
        base: fingerprint of the model that has the old rows; that of the result follows.
        slots, tables: N of one table, and how many tables there are.
    """
    differs = ~equal_rows(old, new)
    ids, old, new = ids[differs], old[differs], new[differs]
    dtype = str(old.dtype).removeprefix("torch.")
    metadata = PatchMetadata(base, base, slots, tables, old.shape[1], dtype, list(lineage))
    patch = Patch(ids, old, new, metadata)
    result = moved(base, _change(patch))
    return dataclasses.replace(patch, metadata=dataclasses.replace(metadata, result=result))


def save_patch(path: str, patch: Patch) -> None:
    """Writes a file that is complete or absent, to a path or fsspec URL."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(patch.metadata)})
    tensors = {"ids": patch.ids, "old": patch.old, "new": patch.new}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(path, safetensors.torch.save(tensors, {METADATA: text}))


def load_patch(path: str) -> Patch:
    """Reads a patch that is whole: its rows lead from its base to its result.

    Raises:
        PatchError: it is missing, torn, damaged, or no patch.
    """
    try:
        if not storage.exists(path):
            raise storage.missing(path)
        content = storage.read_bytes(path)
    except DataError as error:
        raise PatchError(str(error)) from error
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        fields = json.loads(header["__metadata__"][METADATA])
        version = fields.pop("format")
        if version != FORMAT:
            raise PatchError(f"{path}: has format {version}, this version reads {FORMAT}")
        lineage = [LineageStep(**step) for step in fields.pop("lineage")]
        metadata = PatchMetadata(lineage=lineage, **fields)
        patch = Patch(tensors["ids"], tensors["old"], tensors["new"], metadata)
        whole = _is_whole(patch)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(
            f"{path}: is no patch, or a torn one ({error!r}); copy or export it again"
        ) from error
    if not whole:
        raise PatchError(
            f"{path}: is damaged, its rows do not lead from its base {metadata.base} to its "
            f"result {metadata.result}; copy or export it again"
        )
    return patch


def inverse(patch: Patch) -> Patch:
    """Returns the patch that leads from the result back to the base. It has no lineage."""
    about = patch.metadata
    turned = dataclasses.replace(about, base=about.result, result=about.base, lineage=[])
    return Patch(patch.ids, patch.new, patch.old, turned)


def chain(patches: Sequence[Patch]) -> Patch:
    """Returns one patch from the first one's base to the last one's result.

    Raises:
        PatchError: one does not begin where the one before it ends.
    """
    whole = patches[0]
    for number, following in enumerate(patches[1:], start=2):
        if following.metadata.base != whole.metadata.result:
            raise PatchError(
                f"patch {number} changes weights with fingerprint {following.metadata.base}, but "
                f"the patch before it leads to {whole.metadata.result}; give patches in the order "
                "in which they were made"
            )
        whole = _combined(whole, following, following.new)
        if whole.metadata.result != following.metadata.result:
            raise PatchError(
                f"patch {number} has old values that the patches before it do not lead to, though "
                f"both name the weights {following.metadata.base}; export it again"
            )
    return whole


def merge(patches: Sequence[Patch], on_overlap: OverlapPolicy) -> tuple[Patch, Tensor]:
    """Returns one patch that does what all do, and the slots that independent patches share.

    Each patch either begins where those before it end, or has the base that they have. Rows that
    come back to their old values are left out.

    Args:
        patches: 1 or more, in order.
        on_overlap: what happens to a row that several patches of one base change: "refuse" raises;
            "last" takes the last one's values; "sum" adds the changes, in float64.

    Raises:
        PatchError: a patch fits neither way, or there is overlap and it is to be refused.
    """
    whole, shared = patches[0], [patches[0].ids[:0]]
    for number, other in enumerate(patches[1:], start=2):
        here, there = whole.metadata, other.metadata
        if there.base == here.result:
            whole = chain([whole, other])
            continue
        if there.base != here.base:
            raise PatchError(
                f"patch {number} is of another base: it changes weights with fingerprint "
                f"{there.base}; those before it change {here.base} and lead to {here.result}"
            )
        in_whole, in_other = _shared_places(whole.ids, other.ids)
        overlap = whole.ids[in_whole]
        check_old_rows(other.old[in_other], whole.old[in_whole], overlap, f"patch {number}")
        if len(overlap) and on_overlap == "refuse":
            raise PatchError(
                f"patch {number} changes {slots_text(overlap)} that patches before it change "
                "too; say what becomes of them: --on-overlap last takes the values of the last "
                "patch, --on-overlap sum adds the changes"
            )
        new = other.new.clone()
        if on_overlap == "sum":
            old = other.old[in_other].double()
            changes = (whole.new[in_whole].double() - old) + (new[in_other].double() - old)
            new[in_other] = (old + changes).to(new.dtype)
        whole = _combined(whole, other, new)
        shared.append(overlap)
    return whole, torch.cat(shared).unique()


def slots_text(ids: Tensor) -> str:
    """Returns how many slots these are, with examples."""
    if not len(ids):
        return "no slots"
    examples = [str(slot) for slot in ids[:EXAMPLES].tolist()]
    more = ["..."] if len(ids) > EXAMPLES else []
    return f"{len(ids):,} slots ({', '.join(examples + more)})"


def check_base(found: str, patch: Patch, what: str) -> None:
    """Passes if the weights with fingerprint `found` are those that the patch changes.

    Raises:
        PatchError: they are not; it names both fingerprints.
    """
    about = patch.metadata
    if found == about.base:
        return
    hint = (
        "they are already those that it leads to"
        if found == about.result
        else "give the weights it was made from"
    )
    raise PatchError(
        f"{what}: the patch is of other weights: their fingerprint is {found}, the patch needs "
        f"{about.base}; {hint}"
    )


def check_old_rows(found: Tensor, old: Tensor, slots: Tensor, what: str) -> None:
    """Passes if the rows found (P, V) are the old rows of a patch, bit for bit.

    Raises:
        PatchError: one is not; it names the slot.
    """
    differs = ~equal_rows(found, old)
    if differs.any():
        raise PatchError(
            f"{what}: {slots_text(slots[differs])} do not have the old values of the patch"
        )


def equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """Returns which rows of two (P, V) tensors have the same bits, (P,) bool."""
    return torch.from_numpy((bytes_of_rows(a) == bytes_of_rows(b)).all(axis=1))


def _combined(first: Patch, second: Patch, second_new: Tensor) -> Patch:
    """First's rows, then `second_new` for the rows of the second; old values are the first's."""
    in_first, in_second = _shared_places(first.ids, second.ids)
    alone = torch.ones(len(second.ids), dtype=torch.bool)
    alone[in_second] = False
    new = first.new.clone()
    new[in_first] = second_new[in_second]
    ids, order = torch.cat([first.ids, second.ids[alone]]).sort()
    about = first.metadata
    return make_patch(
        ids,
        torch.cat([first.old, second.old[alone]])[order],
        torch.cat([new, second_new[alone]])[order],
        about.base,
        about.slots,
        about.tables,
        [*about.lineage, *second.metadata.lineage],
    )


def _shared_places(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ids that both have are in each; both ascend."""
    in_a = torch.isin(a, b, assume_unique=True).nonzero().flatten()
    return in_a, torch.searchsorted(b, a[in_a])


def _change(patch: Patch) -> int:
    """What the patch adds to the fingerprint of its base."""
    return sum(
        rows_sum(identity, slots, bytes_of_rows(new))
        - rows_sum(identity, slots, bytes_of_rows(old))
        for identity, slots, old, new in _tables(patch)
    )


def _tables(patch: Patch) -> Iterator[tuple[bytes, list[int], Tensor, Tensor]]:
    about = patch.metadata
    for table in range(about.tables):
        slots, old, new = patch.rows_of(table, 0, about.slots)
        shape = (about.slots, about.v_dim)
        yield tensor_id(table_name(table), about.torch_dtype, shape), slots.tolist(), old, new


def _is_whole(patch: Patch) -> bool:
    """Whether the tensors are what the metadata says. ValueError for what cannot be a patch."""
    about, ids = patch.metadata, patch.ids
    rows = (len(ids), about.v_dim)
    for name, tensor in (("old", patch.old), ("new", patch.new)):
        if tuple(tensor.shape) != rows or tensor.dtype != about.torch_dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    if ids.dtype != torch.int64 or ids.dim() != 1 or not (ids[1:] > ids[:-1]).all():
        raise ValueError("ids do not ascend")
    if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < about.tables * about.slots:
        raise ValueError("ids beyond the tables")
    return moved(about.base, _change(patch)) == about.result
