"""A step of sparse memory finetuning: find the slots that this batch uses, then learn only them.

    1. without gradients, per micro-batch: forward to the last memory layer; keep the state at the
       lookup of the first one, count the accesses of tokens that are not padding
    2. rank the touched slots on their owners, take the best of all: the same on every rank
    3. per micro-batch: go on from the kept state; backward to the selected rows alone
    4. sum over replicas, clip, update the rows

Continual Learning via Sparse Memory Finetuning (arXiv 2510.15103). The batch of the paper is the
global batch: the slots are chosen once a step, from all ranks and micro-batches. Nothing of the
table's size is made.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.config.job import JobConfig
from titan_smf.errors import CheckpointError
from titan_smf.model.llama import Addressed, MemoryLlama
from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.sparse.accesses import OwnedSlots, sum_over_replicas, touched_slots
from titan_smf.sparse.document_frequency import Background
from titan_smf.sparse.ranking import (
    Selection,
    SelectionRule,
    overlap,
    select,
    selected_access_share,
    verify_selection,
)
from titan_smf.sparse.row_optimizer import (
    RowAdamW,
    RowOptimizer,
    RowSGD,
    clip_row_gradients,
)

SELECTIONS_FILE = "selections.jsonl"
ROWS_SUFFIX = ".rows"
"""Of safetensors files with the state of rows, which are no tensors of the whole model."""


class MicroBatch(NamedTuple):
    """What one forward pass of this rank takes, on the device."""

    tokens: Tensor
    """(B, S)."""
    labels: Tensor
    """(B, S)."""
    new: Tensor
    """(B, S) bool, the tokens to be learned: neither padding nor replayed background."""
    masks: dict[str, Any]
    """Keyword arguments of the forward pass."""


def freeze(model: MemoryLlama) -> None:
    """Nothing has a gradient; selected rows get theirs through `ValueTable.select`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def row_optimizers(model: MemoryLlama, config: JobConfig) -> list[RowOptimizer]:
    """One for each table: `optimizer.name` with the rate and decay of `[memory]`.

    They keep the base values of the rows they change, for the run's patch.
    """
    settings, rate = config.optimizer, config.memory.value_lr
    decay, betas = config.memory.value_weight_decay, (settings.beta1, settings.beta2)
    if settings.name == "SGD":
        return [RowSGD(table, rate, decay, keep_base=True) for table in model.value_tables()]
    return [
        RowAdamW(table, rate, betas, settings.eps, decay, keep_base=True)
        for table in model.value_tables()
    ]


class SparseMemory:
    """Selects and updates, step after step, and remembers what it selected last.

    Args:
        model: frozen, with at least one memory layer.
        optimizers: one for each table.
        config: its `selection`, and the seed for the random ranking.
        replicate_group: the ranks that hold the same rows; None if no other does.
        loss_fn: loss summed over target tokens, of logits and labels.
        context: entered around every forward pass.
        folder: for the log of selections.
    """

    def __init__(
        self,
        model: MemoryLlama,
        optimizers: Sequence[RowOptimizer],
        config: JobConfig,
        replicate_group: dist.ProcessGroup | None,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        context: Callable[[], AbstractContextManager[Any]],
        folder: Path,
    ) -> None:
        self.model = model
        self.tables: list[ValueTable] = list(model.value_tables())
        self.optimizers = optimizers
        self.settings = config.selection
        self.seed = config.debug.seed or 0
        self.max_norm = float(config.training.max_norm)
        self.background: Background | None = None
        """The counts of background data, to be set before the first step that needs them."""
        self.replicate_group = replicate_group
        self.shard_group = self.tables[0].group
        self.loss_fn = loss_fn
        self.context = context
        self.owned = owned_slots(model)
        self.previous: Tensor | None = None
        """Ids of the slots that the step before selected."""
        self.log = folder / SELECTIONS_FILE if self.settings.log else None

    def step(
        self, batches: Sequence[MicroBatch], global_targets: int, step: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Learn one global batch, of which `batches` are this rank's micro-batches.

        Returns:
            this rank's part of the loss, the norm of the selected rows' gradient, and metrics.
        """
        states, accesses = self._find_accesses(batches)
        selection = self._select(accesses, step)
        selected = self._selected_rows(selection)
        losses = []
        for batch, state in zip(batches, states, strict=True):
            with self.context():
                logits, _ = self.model(state, **batch.masks, part="from_memory", selected=selected)
                loss = self.loss_fn(logits, batch.labels) / global_targets
            loss.backward()
            losses.append(loss.detach())
        for table, rows in zip(self.tables, selected, strict=True):
            table.reduce_replica_gradients(rows)
        norm = clip_row_gradients(selected, self.max_norm, self.shard_group)
        for optimizer, rows in zip(self.optimizers, selected, strict=True):
            optimizer.step(rows)
        return torch.stack(losses).sum(), norm, self._metrics(selection, step)

    def save_files(self, folder: Path) -> None:
        """Write the state of the rows this rank owns; of replicas the first one does."""
        if self.replicate_group is not None and dist.get_rank(self.replicate_group) != 0:
            return
        for table, optimizer in enumerate(self.optimizers):
            path = folder / f"rows-{table}-{self.owned.start}{ROWS_SUFFIX}"
            safetensors.torch.save_file(optimizer.state_tensors(), path)

    def load_files(self, folder: Path) -> None:
        """Take the state of the rows this rank owns from the files of all ranks.

        Raises:
            CheckpointError: it is the state of another kind of optimizer.
        """
        for table, optimizer in enumerate(self.optimizers):
            files = sorted(folder.glob(f"rows-{table}-*{ROWS_SUFFIX}"))
            try:
                optimizer.load_state_tensors(
                    _read_rows(file, *self.tables[table].row_range) for file in files
                )
            except ValueError as error:
                raise CheckpointError(
                    f"{folder}: {error}; go on with the optimizer.name of that run, or start a new "
                    "one from its weights by checkpoint.initial_load_path"
                ) from None

    def state_dict(self) -> dict[str, Any]:
        """What the last step selected."""
        return {"selected": None if self.previous is None else self.previous.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last step of the run that was saved."""
        device = self.tables[0].local_values().device
        selected = state_dict["selected"]
        if selected is not None:
            self.previous = torch.tensor(selected, dtype=torch.int64, device=device)

    @torch.no_grad()
    def _find_accesses(self, batches: Sequence[MicroBatch]) -> tuple[list[Addressed], list[Tensor]]:
        """The states at the first memory layer, and the ids of all slots that were read."""
        states, accesses = [], []
        for tokens, _, new, masks in batches:
            with self.context():
                state, rows = self.model(tokens, **masks, counted=new, part="to_memory")
            states.append(state)
            accesses += slot_ids(rows, self.owned)
        return states, accesses

    def _select(self, accesses: Sequence[Tensor], step: int) -> Selection:
        touched = sum_over_replicas(touched_slots(accesses), self.replicate_group)
        settings, shards = self.settings, self.shard_group
        rule = SelectionRule(settings.ranking, settings.top_t, self.seed, self.background)
        selection = select(touched, rule, step, shards)
        if settings.verify:
            replicas = self.replicate_group
            verify_selection(selection, accesses, self.owned, rule, step, shards, replicas)
        return selection

    def _selected_rows(self, selection: Selection) -> list[SelectedRows]:
        """The part of the selection that this rank owns, for each table."""
        ids = selection.ids.sort().values
        table, slot = ids // self.owned.num_slots, ids % self.owned.num_slots
        here = (slot >= self.owned.start) & (slot < self.owned.stop)
        return [
            values.select(slot[here & (table == index)] - self.owned.start)
            for index, values in enumerate(self.tables)
        ]

    def _metrics(self, selection: Selection, step: int) -> dict[str, float]:
        previous, self.previous = self.previous, selection.ids
        if self.log is not None and dist.get_rank() == 0:
            line = {
                "step": step,
                "slots": selection.ids.tolist(),
                "counts": selection.counts.tolist(),
                "scores": selection.scores.tolist(),
                "accessed": selection.num_touched,
            }
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        values = {
            "sparse/rows_updated": float(len(selection.ids)),
            "sparse/distinct_rows": float(self._distinct_rows()),
            "sparse/selected_access_share": selected_access_share(selection),
            "numbers_updated": float(len(selection.ids) * self.tables[0].values.shape[1]),
        }
        if previous is not None:
            values["sparse/overlap"] = overlap(selection.ids, previous)
        return values

    def _distinct_rows(self) -> int:
        """The rows of all tables and ranks that were ever updated, each once."""
        rows = sum(len(optimizer.store) for optimizer in self.optimizers)
        everywhere = torch.tensor(rows, device=self.tables[0].local_values().device)
        if self.shard_group is not None:
            dist.all_reduce(everywhere, group=self.shard_group)
        return int(everywhere.item())


def _read_rows(file: Path, start: int, stop: int) -> dict[str, Tensor]:
    """The entries of a file of rows for `start <= row < stop`, reading no others."""
    with safetensors.safe_open(file, "pt") as stored:
        rows = stored.get_tensor("rows")
        first, end = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
        return {name: stored.get_slice(name)[first:end] for name in stored.keys()}  # noqa: SIM118


def owned_slots(model: MemoryLlama) -> OwnedSlots:
    """The slots of all tables whose rows this rank holds."""
    tables = list(model.value_tables())
    start, stop = tables[0].row_range
    return OwnedSlots(tables[0].num_slots, start, stop, len(tables))


def slot_ids(accesses: Sequence[Tensor], owned: OwnedSlots) -> list[Tensor]:
    """Slot ids of the accesses that a forward pass reports, one tensor for each memory layer."""
    return [owned.ids(rows, layer % owned.num_tables) for layer, rows in enumerate(accesses)]
