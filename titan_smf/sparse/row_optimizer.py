"""SGD and AdamW that touch only the selected rows of a value table.

    C rows ever selected here, S selected rows here, V value dim

A masked gradient in a usual optimizer goes wrong: momentum moves rows that have left the mask, and
weight decay moves all of them. Here a row changes, decays and has its moments changed only in a
step in which it is selected. State exists for the rows that were ever selected, on their owner;
memory and time do not depend on the size of the table.

A row is computed in float32 (float64 for a float64 table) and rounded to the values' dtype, to the
nearest and to even. In bfloat16 a change below 1/512 of a value is therefore lost, in every step
anew: use float32 values, or a learning rate that is large enough.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.sparse.row_store import RowStore

Field = tuple[tuple[int, ...], torch.dtype]


class RowOptimizer(Optimizer):
    """Updates the selected rows of one table, and keeps the state of its rows by their ids.

    It is a torch optimizer for the sake of learning rate schedules. `state_dict` holds no state of
    rows: save `state_tensors`.

    Args:
        table: sharded before, if it is to be.
        fields: what the optimizer keeps of a row.
        defaults: settings, with `lr` among them.
        keep_base: also keep each row's values from before its first change.
    """

    def __init__(
        self,
        table: ValueTable,
        fields: dict[str, Field],
        defaults: dict[str, Any],
        keep_base: bool,
    ) -> None:
        super().__init__([table.values], defaults)
        self.table = table
        if keep_base:
            fields = fields | {"base": ((table.v_dim,), table.values.dtype)}
        self.fields = fields
        self.store = RowStore(fields, table.local_values().device)

    @torch.no_grad()
    def step(self, selected: SelectedRows) -> None:  # type: ignore[override]
        """Update `selected.values` in place by their gradient, and writes them into the table.

        One selection at a time: the table's rows must be as they were when they were selected. A
        selected row that was not read has gradient zero: it decays, and its moments shrink.
        """
        table, values = self.table.local_values(), selected.values
        places, is_new = self.store.put(selected.rows)
        if "base" in self.fields:
            self.store.tensors["base"][places[is_new]] = values[is_new].to(table.dtype)
        self._update(values, selected.gradient, places)
        table.index_copy_(0, selected.rows, values.to(table.dtype))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what this rank keeps: `rows`, ascending global ids (C,) int64, and all fields.

        Copies, whose rows are in the order of the ids; a replica's are the same.
        """
        fields = {name: self.store.in_order(name) for name in self.fields}
        return {"rows": self.store.rows() + self.table.row_range[0], **fields}

    def base_rows(self) -> tuple[Tensor, Tensor]:
        """Return the ids of `state_tensors`, (C,), and the rows' values from before their first
        change, (C, V). Needs `keep_base`."""
        return self.store.rows() + self.table.row_range[0], self.store.in_order("base")

    def load_state_tensors(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Replace the state by that of a run on any number of ranks.

        Args:
            parts: the `state_tensors` of its ranks, in any order, with or without those of
                replicas. Only rows that belong to this rank are kept.

        Raises:
            ValueError: the state is of another kind of optimizer.
        """
        start, stop = self.table.row_range
        self.store = RowStore(self.fields, self.store.keys.device)
        for part in parts:
            if part.keys() != {"rows", *self.fields}:
                found, needed = sorted(part), sorted({"rows", *self.fields})
                raise ValueError(f"state of another row optimizer: {found}, needed {needed}")
            mine = (part["rows"] >= start) & (part["rows"] < stop)
            places, _ = self.store.put((part["rows"][mine] - start).to(self.store.keys.device))
            for name, tensor in self.store.tensors.items():
                tensor[places] = part[name][mine].to(tensor)

    def _update(self, values: Tensor, gradient: Tensor, places: Tensor) -> None:
        """Update `values` (S, V) in place and the rows' state at `places` (S,)."""
        raise NotImplementedError


class RowSGD(RowOptimizer):
    """`row <- row - lr * (gradient + weight_decay * row)`. Without momentum it needs no state.

    The paper's `lr` is 2 to 5; only selected rows decay. `keep_base` is as in `RowOptimizer`.
    """

    def __init__(
        self, table: ValueTable, lr: float, weight_decay: float = 0.0, keep_base: bool = False
    ) -> None:
        super().__init__(table, {}, {"lr": lr, "weight_decay": weight_decay}, keep_base)

    def _update(self, values: Tensor, gradient: Tensor, places: Tensor) -> None:
        settings = self.param_groups[0]
        values.mul_(1 - settings["lr"] * settings["weight_decay"])
        values.sub_(gradient, alpha=settings["lr"])


class RowAdamW(RowOptimizer):
    """AdamW (arXiv 1711.05101) in which a row's moments and decay advance only when it is selected.

    The bias correction counts the steps of the row: its moments begin at zero in the step in which
    it is first selected. With the count of all steps the first update of a row that is selected
    late would be (1 - beta1) / sqrt(1 - beta2) times as large as it should be: 3.2 times at
    betas of 0.9 and 0.999.

    The arguments are those of `torch.optim.AdamW`, and `keep_base` of `RowOptimizer`.
    """

    def __init__(
        self,
        table: ValueTable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        keep_base: bool = False,
    ) -> None:
        dtype = torch.promote_types(table.values.dtype, torch.float32)
        fields: dict[str, Field] = {
            "first_moment": ((table.v_dim,), dtype),
            "second_moment": ((table.v_dim,), dtype),
            "steps": ((), torch.int32),
        }
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(table, fields, defaults, keep_base)

    def _update(self, values: Tensor, gradient: Tensor, places: Tensor) -> None:
        state, settings = self.store.tensors, self.param_groups[0]
        lr, (beta1, beta2), eps = settings["lr"], settings["betas"], settings["eps"]
        steps = state["steps"][places] + 1
        first = state["first_moment"].index_select(0, places).lerp_(gradient, 1 - beta1)
        second = state["second_moment"].index_select(0, places).mul_(beta2)
        second.addcmul_(gradient, gradient, value=1 - beta2)
        state["steps"][places] = steps
        state["first_moment"].index_copy_(0, places, first)
        state["second_moment"].index_copy_(0, places, second)

        steps = steps.double().unsqueeze(1)  # 1 - beta2**n loses all digits in float32
        root = (1 - beta2**steps).sqrt()
        size = (lr * root / (1 - beta1**steps)).to(values.dtype)
        values.mul_(1 - lr * settings["weight_decay"])
        denominator = second.sqrt_().add_((eps * root).to(values.dtype))
        values.addcdiv_(first.mul_(size), denominator, value=-1)


@torch.no_grad()
def clip_row_gradients(
    selections: Iterable[SelectedRows], max_norm: float, shard_group: dist.ProcessGroup | None
) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`; returns what it was before.

    Every row of the shard group counts once, so replicas agree. `math.inf` only measures.

    Args:
        selections: of all tables, on this rank, after `reduce_replica_gradients`.
        max_norm: of the gradients of all selected rows on all ranks, as one vector.
        shard_group: the ranks that hold the other rows; None if all rows are here.
    """
    gradients = [selected.gradient for selected in selections]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    square = torch.stack(norms).square().sum()
    if shard_group is not None:
        dist.all_reduce(square, group=shard_group)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm
