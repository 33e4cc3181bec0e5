"""What a patch is, as a short text."""

import torch

from titan_smf import storage
from titan_smf.checkpoint.patch import Patch


def describe_patch(path: str, patch: Patch) -> str:
    """Returns lines of a name and a value: rows, size, change, fingerprints, lineage.

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
        ("change", _change(patch)),
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
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _change(patch: Patch) -> str:
    """Norms of the difference between new and old rows."""
    if not len(patch.ids):
        return "none"
    old = patch.old.double()
    norms = (patch.new.double() - old).norm(dim=1)
    relative = norms.norm() / old.norm()
    return (
        f"norm {norms.norm():.4g} ({relative:.2%} of the old rows'), a row: "
        f"median {norms.median():.4g}, largest {norms.max():.4g}"
    )
