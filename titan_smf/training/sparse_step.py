"""A step of sparse memory finetuning: find the slots that a batch uses, then learn only them.

    1. without gradients, per micro-batch: forward to the last memory layer; keep the lookup of the
       first one, count the accesses of tokens that are not padding
    2. rank the touched slots on their owners, take the best of all: the same on every rank
    3. per micro-batch: go on from the kept lookup; backward to the selected rows alone
    4. sum over replicas, clip, update the rows

Continual Learning via Sparse Memory Finetuning (arXiv 2510.15103). The batch of the paper is the
global batch: the slots are chosen once a step, from all ranks and micro-batches. Nothing of the
table's size is made.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_smf.config.job import JobConfig
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.model.llama import MemoryLlama, SlotLookup
from titan_smf.model.value_table import SelectedRows, ValueTable
from titan_smf.runtime import is_first_rank
from titan_smf.sparse.accesses import OwnedSlots, all_reduce, sum_over_replicas, touched_slots
from titan_smf.sparse.ranking import (
    Selection,
    SelectionRule,
    overlap,
    select,
    selected_access_share,
    verify_selection,
)
from titan_smf.sparse.row_optimizer import RowOptimizer, clip_row_gradients
from titan_smf.storage import drop_lines_after
from titan_smf.training.background import load_background
from titan_smf.training.full_step import MicroBatch

SELECTIONS_FILE = "selections.jsonl"


class SparseStep:
    """Learns one global batch after another, and remembers what it selected last.

    Args:
        model: frozen, with at least one memory layer.
        optimizers: one for each table.
        config: its `[selection]`, `training.max_norm`, and the seed for the random ranking.
        loss_fn: loss summed over target tokens, of logits and labels.
        context: entered around every forward pass.
    """

    def __init__(
        self,
        model: MemoryLlama,
        optimizers: Sequence[RowOptimizer],
        config: JobConfig,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        context: AbstractContextManager[Any],
    ) -> None:
        self.model = model
        self.tables: list[ValueTable] = list(model.value_tables())
        self.optimizers = optimizers
        self.config = config
        self.loss_fn = loss_fn
        self.context = context
        self.log: Path | None = None
        if config.selection.log and is_first_rank():
            self.log = Path(config.job.dump_folder) / SELECTIONS_FILE
        self.owned = OwnedSlots.of(self.tables)
        ranking, top_t = config.selection.ranking, config.selection.top_t
        self.rule = SelectionRule(ranking, top_t, config.debug.seed or 0)
        self.previous: Tensor | None = None
        """Ids of the slots that the step before selected."""

    def start(self, step: int, tokenizer: Tokenizer) -> None:
        """Begin a run that goes on after `step`; load the counts that the ranking needs.

        Raises:
            IdfError: they cannot be read, or are of another model or tokenizer.
        """
        if self.config.needs_counts:
            path, device = self.config.selection.idf_path, self.tables[0].local_values().device
            background = load_background(path, self.model, tokenizer, device)
            self.rule = dataclasses.replace(self.rule, background=background)
        if self.log is not None:
            drop_lines_after(self.log, step)

    def step(
        self, batches: Sequence[MicroBatch], global_targets: int, step: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Learn one global batch, of which `batches` are this rank's micro-batches.

        Returns:
            this rank's part of the loss, the norm of the selected rows' gradient, and metrics.
        """
        lookups, accesses = self._find_accesses(batches)
        selection = self._select(accesses, step)
        selected = self._selected_rows(selection)
        losses = []
        for batch, lookup in zip(batches, lookups, strict=True):
            with self.context:
                logits, _ = self.model(lookup, **batch.masks, part="from_memory", selected=selected)
                loss = self.loss_fn(logits, batch.labels) / global_targets
            loss.backward()
            losses.append(loss.detach())
        for table, rows in zip(self.tables, selected, strict=True):
            table.reduce_replica_gradients(rows)
        max_norm = float(self.config.training.max_norm)
        norm = clip_row_gradients(selected, max_norm, self.tables[0].group)
        for optimizer, rows in zip(self.optimizers, selected, strict=True):
            optimizer.step(rows)
        if self.log is not None:
            _write_selection(self.log, selection, step)
        return torch.stack(losses).sum(), norm, self._metrics(selection)

    def state_dict(self) -> dict[str, Any]:
        """Return what the last step selected."""
        return {"selected": None if self.previous is None else self.previous.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last step of the run that was saved."""
        device = self.tables[0].local_values().device
        selected = state_dict["selected"]
        if selected is not None:
            self.previous = torch.tensor(selected, dtype=torch.int64, device=device)

    @torch.no_grad()
    def _find_accesses(
        self, batches: Sequence[MicroBatch]
    ) -> tuple[list[SlotLookup], list[Tensor]]:
        """Return the lookups of the first memory layer, and the ids of all slots that were read."""
        lookups, accesses = [], []
        for tokens, _, new, masks in batches:
            with self.context:
                lookup, rows = self.model(tokens, **masks, counted=new, part="to_memory")
            lookups.append(lookup)
            accesses += self.owned.ids_by_layer(rows)
        return lookups, accesses

    def _select(self, accesses: Sequence[Tensor], step: int) -> Selection:
        shards, replicas = self.tables[0].group, self.tables[0].replicate_group
        touched = sum_over_replicas(touched_slots(accesses), replicas)
        selection = select(touched, self.rule, step, shards)
        if self.config.selection.verify:
            verify_selection(selection, accesses, self.owned, self.rule, step, shards, replicas)
        return selection

    def _selected_rows(self, selection: Selection) -> list[SelectedRows]:
        """Return the part of the selection that this rank owns, for each table."""
        ids = selection.ids.sort().values
        table, slot = ids // self.owned.num_slots, ids % self.owned.num_slots
        here = (slot >= self.owned.start) & (slot < self.owned.stop)
        return [
            values.select(slot[here & (table == index)] - self.owned.start)
            for index, values in enumerate(self.tables)
        ]

    def _metrics(self, selection: Selection) -> dict[str, float]:
        previous, self.previous = self.previous, selection.ids
        # Rows of this rank that were ever updated.
        distinct = selection.ids.new_tensor(sum(len(each.store) for each in self.optimizers))
        values = {
            "sparse/rows_updated": float(len(selection.ids)),
            "sparse/distinct_rows": float(all_reduce(distinct, self.tables[0].group)),
            "sparse/selected_access_share": selected_access_share(selection),
            "numbers_updated": float(len(selection.ids) * self.tables[0].v_dim),
        }
        if previous is not None:
            values["sparse/overlap"] = overlap(selection.ids, previous)
        return values


def _write_selection(path: Path, selection: Selection, step: int) -> None:
    line = {
        "step": step,
        "slots": selection.ids.tolist(),
        "counts": selection.counts.tolist(),
        "scores": selection.scores.tolist(),
        "accessed": selection.num_touched,
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
