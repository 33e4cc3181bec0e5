"""Patches of stored checkpoints: made from two of them, applied to one, and taken back.

    base, finetuned         --export-->  patch
    base, patches ...       --apply-->   the finetuned weights, bit for bit
    finetuned, patches ...  --revert-->  the base's weights, bit for bit

What is written is a committed checkpoint of weights alone, with the shards of the one it was made
from: runs start from it on any number of ranks (`checkpoint.initial_load_path`), none goes on.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from titan_smf.checkpoint.fingerprint import RowBytes, rows_as_bytes, table_name
from titan_smf.checkpoint.patch import (
    Patch,
    chain,
    check_base,
    check_old_rows,
    inverse,
    make_patch,
    run_lineage,
)
from titan_smf.checkpoint.stored_weights import (
    Progress,
    Report,
    RowNumbers,
    Rows,
    StoredTensor,
    StoredWeights,
)
from titan_smf.errors import PatchError


def export_patch(base: Path, finetuned: Path, data: str, report: Report) -> Patch:
    """Return the patch that leads from one checkpoint to another.

    Args:
        base, finetuned: `step-N` folders, or folders of runs for their newest checkpoint.
        data: what the finetuned model learned, in words; empty for what its run's settings say.

    Raises:
        CheckpointError: one is missing or damaged.
        PatchError: they differ in more than rows of value tables.
    """
    before, after = StoredWeights(base, report), StoredWeights(finetuned, report)
    _check_same_tensors(before, after)
    tables = _tables(before)
    if not tables:
        raise PatchError(f"{before.path}: has no value tables, there is nothing to patch")
    progress = Progress("comparing", before.num_bytes, report)
    for tensor in before.tensors.values():
        if tensor in tables:
            continue
        blocks = _differing_rows(tensor, after.tensors[tensor.name], progress)
        if any(len(numbers) for numbers, _, _ in blocks):
            raise PatchError(
                f"{tensor.name} differs between {before.path} and {after.path}; a patch holds rows "
                "of value tables alone, and only sparse memory finetuning changes nothing else"
            )
    slots, changed = tables[0].shape[0], []
    for index, table in enumerate(tables):
        for numbers, rows, new_rows in _differing_rows(table, after.tensors[table.name], progress):
            ids = torch.from_numpy(numbers) + index * slots
            changed.append((ids, _values(rows, table.dtype), _values(new_rows, table.dtype)))
    ids, old, new = map(torch.cat, zip(*changed, strict=True))
    fingerprint, steps = before.fingerprint(), after.state["step"]
    if after.path.parent == before.path.parent:  # of one run
        steps -= before.state["step"]
    lineage = [run_lineage(after.path.parent.parent, steps, fingerprint, data)]
    return make_patch(ids, old, new, fingerprint, slots, len(tables), lineage)


def apply_patches(base: Path, patches: Sequence[Patch], output: Path, report: Report) -> None:
    """Write the checkpoint that the patches, in their order, make of the base.

    Raises:
        CheckpointError: the base is missing or damaged.
        PatchError: the patches do not fit it or each other; nothing is written.
    """
    _write_patched(base, chain(patches), output, report)


def revert_patches(
    checkpoint: Path, patches: Sequence[Patch], output: Path, report: Report
) -> None:
    """Write the checkpoint from which the patches, in their order, have led to the given one.

    Raises what `apply_patches` does.
    """
    _write_patched(checkpoint, inverse(chain(patches)), output, report)


def _write_patched(source: Path, patch: Patch, output: Path, report: Report) -> None:
    if output.exists():
        raise PatchError(f"{output}: exists; give the name of a new folder")
    weights = StoredWeights(source, report)
    check_base(weights.fingerprint(), patch, str(weights.path))
    changes: dict[str, Rows] = {}
    for index, table in enumerate(_tables(weights)):
        slots, old, new = patch.rows_of(index, 0, patch.metadata.slots)
        numbers = slots.numpy()
        found = _values(table.rows(numbers), table.dtype)
        check_old_rows(found, old, slots, f"{weights.path}: {table.name}")
        changes[table.name] = numbers, rows_as_bytes(new)
    about = dataclasses.asdict(patch.metadata)
    patched = {name: about[name] for name in ("base", "result", "lineage")}
    weights.write(output, changes.get, {"patched": patched})
    report(f"{output}: weights {patch.metadata.result}, from {weights.path}")


def _tables(weights: StoredWeights) -> list[StoredTensor]:
    """Return the value tables, in the order of their numbers."""
    names = itertools.takewhile(weights.tensors.__contains__, map(table_name, itertools.count()))
    return [weights.tensors[name] for name in names]


def _check_same_tensors(a: StoredWeights, b: StoredWeights) -> None:
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        here, there = (
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            if (tensor := weights.tensors.get(name))
            else "absent"
            for weights in (a, b)
        )
        if here != there:
            raise PatchError(
                f"{name} is {here} in {a.path} and {there} in {b.path}; these are "
                "checkpoints of different models"
            )


def _differing_rows(
    a: StoredTensor, b: StoredTensor, progress: Progress
) -> Iterator[tuple[RowNumbers, RowBytes, RowBytes]]:
    """Yield the rows in which each block of two tensors differs: numbers, rows of a, rows of b."""
    for numbers, rows in a.blocks():
        others = b.rows(numbers)
        differs = (rows != others).any(axis=1)
        yield numbers[differs], rows[differs], others[differs]
        progress.add(rows.nbytes)


def _values(rows: RowBytes, dtype: torch.dtype) -> torch.Tensor:
    if not len(rows):  # which torch cannot view as another dtype
        return torch.empty(0, rows.shape[1] // dtype.itemsize, dtype=dtype)
    return torch.from_numpy(rows).view(dtype)
