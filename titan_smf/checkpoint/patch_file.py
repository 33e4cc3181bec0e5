"""`patch.safetensors`, the file of a patch: written, read and described.

    ids      (P,) int64            slots, ascending: table * N + slot
    old      (P, V) values' dtype  before the run
    new      (P, V) values' dtype  after it
    header   `patch`, the JSON of `PatchMetadata` and the format's version

The size is that of the P changed rows, twice, and does not depend on the table's.
"""

import dataclasses
import json

import safetensors
import safetensors.torch
import torch

from titan_smf import storage
from titan_smf.checkpoint.patch import LineageStep, Patch, PatchMetadata, result_fingerprint
from titan_smf.errors import DataError, PatchError
from titan_smf.runtime import format_table

FORMAT = 1
METADATA = "patch"


def save_patch(path: str, patch: Patch) -> None:
    """Write a file that is complete or absent, to a path or fsspec URL."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(patch.metadata)})
    tensors = {"ids": patch.ids, "old": patch.old, "new": patch.new}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(path, safetensors.torch.save(tensors, {METADATA: text}))


def load_patch(path: str) -> Patch:
    """Read a patch that is whole: its rows lead from its base to its result.

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


def _is_whole(patch: Patch) -> bool:
    """Return whether the rows lead from base to result; ValueError for what cannot be a patch."""
    about, ids = patch.metadata, patch.ids
    rows = (len(ids), about.v_dim)
    for name, tensor in (("old", patch.old), ("new", patch.new)):
        if tuple(tensor.shape) != rows or tensor.dtype != about.torch_dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    if ids.dtype != torch.int64 or ids.dim() != 1 or not (ids[1:] > ids[:-1]).all():
        raise ValueError("ids do not ascend")
    if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < about.tables * about.slots:
        raise ValueError("ids beyond the tables")
    return result_fingerprint(patch) == about.result


def describe_patch(path: str, patch: Patch) -> str:
    """Return lines of a name and a value: rows, size, change, fingerprints, lineage.

    Args:
        path: of its file, or a URL.
    """
    about = patch.metadata
    all_slots = about.tables * about.slots
    per_table = torch.bincount(patch.ids // about.slots, minlength=about.tables).tolist()
    lines = [
        ("patch", f"{path}, {storage.size_of(path):,} bytes"),
        ("rows", f"{len(patch.ids):,} of {all_slots:,} ({len(patch.ids) / all_slots:.3%})"),
        ("in each table", ", ".join(f"{number:,}" for number in per_table)),
        ("tables", f"{about.tables} of {about.slots:,} x {about.v_dim} {about.dtype}"),
        ("change", _describe_change(patch)),
        ("base", about.base),
        ("result", about.result),
        ("created by", about.created_by),
    ]
    for number, step in enumerate(about.lineage, start=1):
        configuration = step.configuration[:12] or "unknown"
        lines += [
            (f"step {number}", f"{step.steps:,} training steps on {step.data or 'unknown data'}"),
            ("", f"configuration {configuration}, from {step.parent}"),
        ]
    return format_table(lines)


def _describe_change(patch: Patch) -> str:
    """Return the norms of the difference between new and old rows, as text."""
    if not len(patch.ids):
        return "none"
    old = patch.old.double()
    norms = (patch.new.double() - old).norm(dim=1)
    relative = norms.norm() / old.norm()
    return (
        f"norm {norms.norm():.4g} ({relative:.2%} of the old rows'), a row: "
        f"median {norms.median():.4g}, largest {norms.max():.4g}"
    )
