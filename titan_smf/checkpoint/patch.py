"""A patch: the rows that a sparse run changed, and which model they belong to.

    P rows changed, N slots of a table, V value dim

This module makes, inverts, chains and merges patches. `patch_file.py` writes and reads them,
`patch_model.py` applies them to a running model, `patch_checkpoints.py` to stored checkpoints.

A patch names the fingerprints of the weights before and after it. The one after follows from the
one before and the changed rows (`fingerprint.py`), so a patch proves itself: one that is damaged
does not lead from its base to its result.
"""

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from titan_smf import __version__
from titan_smf.checkpoint.fingerprint import (
    format_fingerprint,
    rows_as_bytes,
    sum_row_hashes,
    table_name,
    tensor_id,
)
from titan_smf.errors import PatchError

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
        """Return slots (within the table), old and new values of `start <= slot < stop`."""
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
    """Return the patch of some rows, less those that did not change.

    Args:
        ids, old, new: (P,), (P, V), (P, V), in any order of the ids.
        base: fingerprint of the model that has the old rows; that of the result follows.
        slots, tables: N of one table, and how many tables there are.
    """
    order = ids.argsort()
    order = order[~equal_rows(old, new)[order]]
    dtype = str(old.dtype).removeprefix("torch.")
    metadata = PatchMetadata(base, "", slots, tables, old.shape[1], dtype, list(lineage))
    patch = Patch(ids[order], old[order], new[order], metadata)
    return replace(patch, metadata=replace(metadata, result=result_fingerprint(patch)))


def result_fingerprint(patch: Patch) -> str:
    """Return the fingerprint of the base's weights with the old rows replaced by the new ones."""
    about = patch.metadata
    total, shape = int(about.base, 16), (about.slots, about.v_dim)
    for table in range(about.tables):
        slots, old, new = patch.rows_of(table, 0, about.slots)
        identity = tensor_id(table_name(table), about.torch_dtype, shape)
        total += sum_row_hashes(identity, slots.tolist(), rows_as_bytes(new))
        total -= sum_row_hashes(identity, slots.tolist(), rows_as_bytes(old))
    return format_fingerprint(total)


def run_lineage(folder: Path, steps: int, parent: str, data: str = "") -> LineageStep:
    """Return a run's part in the lineage of a patch, from what its `config.toml` says.

    Args:
        folder: the run's.
        steps: training steps that led to the patch.
        parent: fingerprint of the weights it started from.
        data: what it learned, in words; empty for the path of its stream or of its sources.
    """
    path = folder / "config.toml"
    if not path.is_file():
        return LineageStep("", steps, data, parent)
    content = path.read_bytes()
    settings = tomllib.loads(content.decode())
    sources = settings.get("data", {}).get("sources", [])
    data = data or str(settings.get("stream", {}).get("path") or "")
    data = data or ", ".join(str(source.get("path")) for source in sources)
    return LineageStep(hashlib.sha256(content).hexdigest(), steps, data, parent)


def inverse(patch: Patch) -> Patch:
    """Return the patch that leads from the result back to the base. It has no lineage."""
    about = patch.metadata
    turned = replace(about, base=about.result, result=about.base, lineage=[])
    return Patch(patch.ids, patch.new, patch.old, turned)


def chain(patches: Sequence[Patch]) -> Patch:
    """Return one patch from the first one's base to the last one's result.

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
        whole = _combine(whole, following, following.new)
        if whole.metadata.result != following.metadata.result:
            raise PatchError(
                f"patch {number} has old values that the patches before it do not lead to, though "
                f"both name the weights {following.metadata.base}; export it again"
            )
    return whole


def merge(patches: Sequence[Patch], on_overlap: OverlapPolicy) -> tuple[Patch, Tensor]:
    """Return one patch that does what all do, and the slots that independent patches share.

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
        overlap, in_whole, in_other = _common(whole.ids, other.ids)
        check_old_rows(other.old[in_other], whole.old[in_whole], overlap, f"patch {number}")
        if len(overlap) and on_overlap == "refuse":
            raise PatchError(
                f"patch {number} changes {slots_text(overlap)} that patches before it change "
                "too; say what to do with them: --on-overlap last takes the values of the last "
                "patch, --on-overlap sum adds the changes"
            )
        new = other.new.clone()
        if on_overlap == "sum":
            old = other.old[in_other].double()
            changes = (whole.new[in_whole].double() - old) + (new[in_other].double() - old)
            new[in_other] = (old + changes).to(new.dtype)
        whole = _combine(whole, other, new)
        shared.append(overlap)
    return whole, torch.cat(shared).unique()


def slots_text(ids: Tensor) -> str:
    """Return how many slots these are, with examples."""
    if not len(ids):
        return "no slots"
    examples = [str(slot) for slot in ids[:EXAMPLES].tolist()]
    more = ["..."] if len(ids) > EXAMPLES else []
    return f"{len(ids):,} slots ({', '.join(examples + more)})"


def check_base(found: str, patch: Patch, what: str) -> None:
    """Check that the weights with fingerprint `found` are those that the patch changes.

    Raises:
        PatchError: they are not; it names both fingerprints.
    """
    base = patch.metadata.base
    if found != base:
        hint = "give the weights it was made from"
        if found == patch.metadata.result:
            hint = "they are already those that it leads to"
        raise PatchError(
            f"{what}: the patch is of other weights: their fingerprint is {found}, the patch needs "
            f"{base}; {hint}"
        )


def check_old_rows(found: Tensor, old: Tensor, slots: Tensor, what: str) -> None:
    """Check that the rows found (P, V) are the old rows of a patch, bit for bit.

    Raises:
        PatchError: one is not; it names the slot.
    """
    wrong = slots[~equal_rows(found, old)]
    if len(wrong):
        raise PatchError(f"{what}: {slots_text(wrong)} do not have the old values of the patch")


def equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return which rows of two (P, V) tensors have the same bits, (P,) bool."""
    return torch.from_numpy((rows_as_bytes(a) == rows_as_bytes(b)).all(axis=1))


def _combine(first: Patch, second: Patch, second_new: Tensor) -> Patch:
    """Return the rows of both: where both have one, first's old values and `second_new`."""
    both = torch.cat([first.ids, second.ids]).numpy()
    ids, first_places = np.unique(both, return_index=True)
    last_places = len(both) - 1 - np.unique(both[::-1], return_index=True)[1]
    old = torch.cat([first.old, second.old])[first_places]
    new = torch.cat([first.new, second_new])[last_places]
    about, lineage = first.metadata, [*first.metadata.lineage, *second.metadata.lineage]
    slots, tables = about.slots, about.tables
    return make_patch(torch.from_numpy(ids), old, new, about.base, slots, tables, lineage)


def _common(a: Tensor, b: Tensor) -> list[Tensor]:
    """Return the ids that both have, ascending, and where they are in each."""
    found = np.intersect1d(a.numpy(), b.numpy(), assume_unique=True, return_indices=True)
    return [torch.from_numpy(array) for array in found]
