"""Fingerprints of a model's weights: 128 bits that name them, whichever ranks hold or saved them.

    fingerprint = sum over tensors (id + sum over rows blake2b(row; id, row number))  mod 2**128

where a tensor's id is the blake2b of its name, dtype and shape, and a row is what one index of the
first dimension selects. Being a sum it has the same value for any split into rows and any order,
and it follows a change: given the old and new bytes of a few rows, the fingerprint of the result
is known without reading any other weight, and so is the way back.

What it is worth: two models that differ by accident have equal fingerprints with probability
2**-128. It is no signature. Sums of hashes can be forged by one who may choose many rows freely,
so a fingerprint says which weights these are, not that nobody has tampered with them.

Costs one hash a row: 5 s for a table of 1M rows of 1024 float32, on one CPU core.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_smf.model.names import is_adapter
from titan_smf.runtime import from_all_ranks, is_first_rank

MODULUS = 1 << 128
BLOCK_BYTES = 16 << 20
"""What is held beside the weights: rows are read and hashed in blocks of about this size."""

RowBytes = npt.NDArray[np.uint8]
"""Rows as (rows, bytes of a row): equal bytes, not equal numbers, make equal weights."""


def table_name(table: int) -> str:
    """Return the name of a value table's tensor in checkpoints."""
    return f"model.tables.{table}.values"


def tensor_id(name: str, dtype: torch.dtype, shape: Iterable[int]) -> bytes:
    """Return 16 bytes for a tensor's name, dtype and whole shape."""
    text = f"{name} {dtype} {list(shape)}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def sum_row_hashes(tensor: bytes, numbers: Sequence[int], rows: RowBytes) -> int:
    """Return what rows add to a fingerprint; row 0 also adds the id of the tensor.

    Args:
        tensor: its id.
        numbers: of the rows in the whole tensor, ascending.
        rows: their bytes.
    """
    total = int.from_bytes(tensor, "little") if len(numbers) and numbers[0] == 0 else 0
    for number, row in zip(numbers, np.ascontiguousarray(rows), strict=True):
        salt = number.to_bytes(8, "little")
        digest = hashlib.blake2b(row, digest_size=16, salt=salt, person=tensor).digest()
        total += int.from_bytes(digest, "little")
    return total


def format_fingerprint(total: int) -> str:
    """Return a fingerprint as it is shown and stored: 32 hexadecimal digits."""
    return f"{total % MODULUS:032x}"


def rows_per_block(row_bytes: int) -> int:
    """Return how many rows are hashed at a time."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def rows_as_bytes(rows: Tensor) -> RowBytes:
    """Return rows of any dtype, on the CPU, as bytes; shares their memory if it can."""
    flat = rows.detach().cpu().contiguous().reshape(len(rows), math.prod(rows.shape[1:]))
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty((len(rows), 0), np.uint8)


def model_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a running model, the same as of its checkpoint. Collective.

    Adapters of LoRA are left out: it is the fingerprint of their base. Every rank hashes its
    own rows; of replicas the first one does. A tensor that is split other than by rows (tensor
    parallelism) is gathered for the moment.
    """
    total = 0
    for name, tensor in get_model_state_dict(model).items():
        assert isinstance(tensor, Tensor)
        if is_adapter(name):
            continue
        whole = tensor if tensor.dim() else tensor.reshape(1)  # as in checkpoints
        identity = tensor_id(f"model.{name}", whole.dtype, whole.shape)
        rows, first = _rows_here(whole)
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        for start in range(0, len(rows), rows_per_block(row_bytes)):
            block = rows_as_bytes(rows[start : start + rows_per_block(row_bytes)])
            numbers = range(first + start, first + start + len(block))
            total += sum_row_hashes(identity, numbers, block)
    return format_fingerprint(sum(from_all_ranks(total)))


def _rows_here(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the rows that this rank is to hash, and the number of the first."""
    if not isinstance(tensor, DTensor):
        return tensor if is_first_rank() else tensor[:0], 0
    mesh, placements = tensor.device_mesh, tensor.placements
    # Exactly Shard: a subclass of it leaves gaps between the rows of a rank.
    by_rows = [type(p) is Shard and p.dim == 0 for p in placements]
    others = [isinstance(p, Replicate) for p in placements]
    if sum(by_rows) > 1 or not all(a or b for a, b in zip(by_rows, others, strict=True)):
        whole = tensor.full_tensor()
        return whole if is_first_rank() else whole[:0], 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    first_replica = coordinate is not None and all(
        split or place == 0 for split, place in zip(by_rows, coordinate, strict=True)
    )
    local = tensor.to_local()
    return local if first_replica else local[:0], offset[0]
