"""Patches of checkpoints: made from two of them, applied to one, and taken back.

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

from titan_smf.checkpoint.checkpointer import find_checkpoint
from titan_smf.checkpoint.fingerprint import RowBytes, rows_as_bytes, table_name
from titan_smf.checkpoint.patch import (
    LineageStep,
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
    StoredTensor,
    StoredWeights,
)
from titan_smf.errors import CheckpointError, PatchError


def export_patch(base: Path, finetuned: Path, data: str, report: Report) -> Patch:
    """Return the rows in which two checkpoints differ.

    Args:
        base, finetuned: `step-N` folders, or folders of runs for their newest checkpoint.
        data: what the finetuned model learned, in words; empty for what its run's settings say.

    Raises:
        CheckpointError: one is missing or damaged.
        PatchError: they differ in more than rows of value tables.
    """
    before, after = _open(base), _open(finetuned)
    _check_same_tensors(before, after)
    tables = [before.tensors[name] for name in _table_names(before)]
    if not tables:
        raise PatchError(f"{before.path}: has no value tables, there is nothing to patch")
    progress = Progress("comparing", before.num_bytes, report)
    rest = [tensor for tensor in before.tensors.values() if tensor not in tables]
    for tensor in rest:
        blocks = _differing_rows(tensor, after.tensors[tensor.name], progress)
        if any(len(numbers) for numbers, _, _ in blocks):
            raise PatchError(
                f"{tensor.name} differs between {before.path} and {after.path}; a patch holds rows "
                "of value tables alone, and only sparse memory finetuning changes nothing else"
            )
    slots, ids, old, new = tables[0].shape[0], [], [], []
    for index, table in enumerate(tables):
        for numbers, rows, new_rows in _differing_rows(table, after.tensors[table.name], progress):
            ids.append(torch.from_numpy(numbers) + index * slots)
            old.append(_values(rows, table.dtype))
            new.append(_values(new_rows, table.dtype))
    fingerprint = before.fingerprint(report)
    step = _lineage_step(before, after, fingerprint, data)
    return make_patch(
        torch.cat(ids), torch.cat(old), torch.cat(new), fingerprint, slots, len(tables), [step]
    )


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
    weights = _open(source)
    found = weights.fingerprint(report)
    check_base(found, patch, str(weights.path))
    changes: dict[str, tuple[RowNumbers, RowBytes]] = {}
    for index, name in enumerate(_table_names(weights)):
        slots, old, new = patch.rows_of(index, 0, patch.metadata.slots)
        tensor, numbers = weights.tensors[name], slots.numpy()
        old_here = _values(tensor.rows(numbers), tensor.dtype)
        check_old_rows(old_here, old, slots, f"{weights.path}: {name}")
        changes[name] = numbers, rows_as_bytes(new)
    about = dataclasses.asdict(patch.metadata)
    patched = {name: about[name] for name in ("base", "result", "lineage")}
    weights.write(output, changes, {"patched": patched}, report)
    report(f"{output}: weights {patch.metadata.result}, from {weights.path}")


def _open(path: Path) -> StoredWeights:
    try:
        checkpoint = find_checkpoint(path)
    except CheckpointError:
        raise PatchError(
            f"{path}: no complete checkpoint there; give a run's folder, its checkpoints folder, "
            "or one step-N folder"
        ) from None
    return StoredWeights(checkpoint)


def _table_names(weights: StoredWeights) -> list[str]:
    """The names of the value tables, in the order of their numbers."""
    names = map(table_name, itertools.count())
    return list(itertools.takewhile(lambda name: name in weights.tensors, names))


def _check_same_tensors(a: StoredWeights, b: StoredWeights) -> None:
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        kinds = [
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            if tensor
            else "absent"
            for tensor in (a.tensors.get(name), b.tensors.get(name))
        ]
        if kinds[0] != kinds[1]:
            raise PatchError(
                f"{name} is {kinds[0]} in {a.path} and {kinds[1]} in {b.path}; these are "
                "checkpoints of different models"
            )


def _differing_rows(
    a: StoredTensor, b: StoredTensor, progress: Progress
) -> Iterator[tuple[RowNumbers, RowBytes, RowBytes]]:
    """For each block of two tensors of one shape: the rows that differ, by number and content."""
    for numbers, rows in a.blocks():
        others = b.rows(numbers)
        differs = (rows != others).any(axis=1)
        yield numbers[differs], rows[differs], others[differs]
        progress.add(rows.nbytes)


def _values(rows: RowBytes, dtype: torch.dtype) -> torch.Tensor:
    if not len(rows):  # which torch cannot view as another dtype
        return torch.empty(0, rows.shape[1] // dtype.itemsize, dtype=dtype)
    return torch.from_numpy(rows).view(dtype)


def _lineage_step(base: StoredWeights, tuned: StoredWeights, parent: str, data: str) -> LineageStep:
    """The run that led from one checkpoint to another, as far as its folder tells."""
    steps = tuned.state["step"]
    if tuned.path.parent == base.path.parent:  # of one run
        steps -= base.state["step"]
    return run_lineage(tuned.path.parent.parent, steps, parent, data)
