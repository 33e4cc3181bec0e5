"""Patches of a running model, each rank with its own rows: applied to it, and made from it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_smf.errors import PatchError
from titan_smf.model.value_table import ValueTable
from titan_smf.sparse.fingerprint import model_fingerprint
from titan_smf.sparse.patch import LineageStep, Patch, check_base, check_old_rows, make_patch


@torch.no_grad()
def apply_to_model(model: nn.Module, patch: Patch) -> None:
    """Sets the patch's rows in the model's value tables to their new values. Collective.

    The model's tables are in `model.tables`, and the model is the patch's base or nothing changes.

    Raises:
        PatchError: it is not; on every rank.
    """
    tables = value_tables(model)
    here = [(table.num_slots, table.v_dim, table.values.dtype) for table in tables]
    about = patch.metadata
    there = [(about.slots, about.v_dim, about.torch_dtype)] * about.tables
    if here != there:
        raise PatchError(
            "the patch is of another model: slots, v_dim and type of its value tables are "
            f"{there}, of this model's {here}"
        )
    check_base(model_fingerprint(model), patch, "this model")
    problem = ""
    rows_here = []
    for index, table in enumerate(tables):
        start, stop = table.row_range
        slots, old, new = patch.rows_of(index, start, stop)
        values, rows = table.local_values(), slots - start
        rows_here.append((values, rows.to(values.device), new.to(values.device)))
        try:
            check_old_rows(values[rows.to(values.device)], old, slots, f"value table {index}")
        except PatchError as error:
            problem = problem or str(error)
    if problem := next(filter(None, _of_all_ranks(problem)), ""):
        raise PatchError(problem)
    for values, rows, new in rows_here:
        values[rows] = new


@torch.no_grad()
def patch_of_model(
    model: nn.Module,
    changed: Sequence[tuple[Tensor, Tensor]],
    base: str,
    lineage: Sequence[LineageStep],
) -> Patch | None:
    """Returns the patch that leads from a base to the running model; None but on rank 0.

    All ranks of the first replica call it together, others may; rank 0 receives all changed rows.

    Args:
        changed: for each table global row ids (S,) of this rank, ascending, and the base's values
            of them (S, V): `RowOptimizer.base_rows`.
        base: fingerprint of the base.
        lineage: the runs that led from the base to here, oldest first.
    """
    tables = value_tables(model)
    num_slots, group = tables[0].num_slots, tables[0].group
    ids, old, new = [], [], []
    for index, (table, (rows, base_rows)) in enumerate(zip(tables, changed, strict=True)):
        values = table.local_values()
        ids.append(rows.cpu() + index * num_slots)
        old.append(base_rows.to(values.dtype).cpu())
        new.append(values[rows.to(values.device) - table.row_range[0]].cpu())
    mine = torch.cat(ids), torch.cat(old), torch.cat(new)
    parts: list[tuple[Tensor, Tensor, Tensor]] = [mine]
    if group is not None:
        parts *= dist.get_world_size(group)
        is_first = dist.get_rank(group) == 0
        dist.gather_object(mine, parts if is_first else None, group=group, group_dst=0)
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    whole_ids, whole_old, whole_new = (torch.cat(part) for part in zip(*parts, strict=True))
    whole_ids, order = whole_ids.sort()
    return make_patch(
        whole_ids, whole_old[order], whole_new[order], base, num_slots, len(tables), lineage
    )


def value_tables(model: nn.Module) -> list[ValueTable]:
    """The model's value tables, in the order of their numbers."""
    return [module for module in model.modules() if isinstance(module, ValueTable)]


def _of_all_ranks(text: str) -> list[str]:
    """What each rank says."""
    texts = [text]
    if dist.is_initialized():
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, text)
    return texts
