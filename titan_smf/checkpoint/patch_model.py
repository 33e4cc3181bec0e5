"""Patches of a running model, each rank with its own rows: applied to it, and made from it."""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_smf.checkpoint.fingerprint import model_fingerprint
from titan_smf.checkpoint.patch import LineageStep, Patch, check_base, check_old_rows, make_patch
from titan_smf.errors import PatchError
from titan_smf.model.value_table import ValueTable
from titan_smf.runtime import from_all_ranks, is_first_rank


@torch.no_grad()
def apply_to_model(model: nn.Module, patch: Patch) -> None:
    """Set the patch's rows in the model's value tables to their new values. Collective.

    The model's tables are in `model.tables`, and the model is the patch's base or nothing changes.

    Raises:
        PatchError: it is not; on every rank.
    """
    tables = _value_tables(model)
    here = [(table.num_slots, table.v_dim, table.values.dtype) for table in tables]
    about = patch.metadata
    there = [(about.slots, about.v_dim, about.torch_dtype)] * about.tables
    if here != there:
        raise PatchError(
            "the patch is of another model: slots, v_dim and type of its value tables are "
            f"{there}, of this model's {here}"
        )
    check_base(model_fingerprint(model), patch, "this model")
    problems, rows_here = [], []
    for index, table in enumerate(tables):
        start, stop = table.row_range
        slots, old, new = patch.rows_of(index, start, stop)
        values = table.local_values()
        rows = (slots - start).to(values.device)
        rows_here.append((values, rows, new.to(values.device)))
        try:
            check_old_rows(values[rows], old, slots, f"value table {index}")
        except PatchError as error:
            problems.append(str(error))
    if anywhere := list(itertools.chain(*from_all_ranks(problems))):
        raise PatchError(anywhere[0])
    for values, rows, new in rows_here:
        values[rows] = new


@torch.no_grad()
def patch_of_model(
    model: nn.Module,
    changed: Sequence[tuple[Tensor, Tensor]],
    base: str,
    lineage: Sequence[LineageStep],
) -> Patch | None:
    """Return the patch that leads from a base to the running model; None but on rank 0.

    All ranks of the first replica call it together, others may; rank 0 receives all changed rows.

    Args:
        changed: for each table global row ids (S,) of this rank, ascending, and the base's values
            of them (S, V): `RowOptimizer.base_rows`.
        base: fingerprint of the base.
        lineage: the runs that led from the base to here, oldest first.
    """
    tables = _value_tables(model)
    num_slots = tables[0].num_slots
    parts = []
    for index, (table, (rows, old)) in enumerate(zip(tables, changed, strict=True)):
        values = table.local_values()
        new = values[rows.to(values.device) - table.row_range[0]]
        of_table = (rows + index * num_slots, old.to(values.dtype), new)
        parts.append([_on_first_rank(tensor, table.group) for tensor in of_table])
    if not is_first_rank():
        return None
    ids, old, new = map(torch.cat, zip(*parts, strict=True))
    del parts  # which are as large again
    return make_patch(ids, old, new, base, num_slots, len(tables), lineage)


def _on_first_rank(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return all rows of a group, in rank order, on its first rank's CPU; none elsewhere."""
    if group is None:
        return rows.cpu()
    counts = from_all_ranks(len(rows), group)
    if dist.get_rank(group) != 0:
        if len(rows):
            dist.send(rows.contiguous(), group=group, group_dst=0)
        return rows[:0]
    whole = torch.empty(sum(counts), *rows.shape[1:], dtype=rows.dtype)
    for source, part in enumerate(whole.split(counts)):
        if source == 0:
            part.copy_(rows)
        elif len(part):
            received = torch.empty_like(part, device=rows.device)
            dist.recv(received, group=group, group_src=source)
            part.copy_(received)
    return whole


def _value_tables(model: nn.Module) -> list[ValueTable]:
    """Return the model's value tables, in the order of their numbers."""
    return [module for module in model.modules() if isinstance(module, ValueTable)]
