"""Measures of a sparse step's work on four ranks, against dense work on each rank for all slots.

T tokens, K slots per token, N slots, V value dim, W ranks, t rows learned
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan_smf.bench.lookup import sharded_table
from titan_smf.bench.measure import (
    ACCESS_KINDS,
    Measure,
    median_seconds,
    on_ranks,
    random_slots,
    update_rows,
)
from titan_smf.sparse.accesses import OwnedSlots, touched_slots
from titan_smf.sparse.document_frequency import Background
from titan_smf.sparse.ranking import Selection, SelectionRule, select, tfidf
from titan_smf.sparse.row_optimizer import RowAdamW

T, K, V, W, TOP_T = 1024, 32, 256, 4, 500
DOCUMENTS = 1000


def ranks(runs: int) -> Iterator[Measure]:
    """The selection, and the whole value part of a step; medians of the first rank."""
    for kind in ACCESS_KINDS:
        dense, ours = on_ranks(_selection, W, 1 << 20, kind, runs)[0]
        note = f"{T} tokens a rank, {K} slots each, t {TOP_T}: {ours * 1e3:.1f} ms"
        name = f"selection: dense counts, all-reduce / ours, {W} ranks, N 1M, {kind}"
        yield Measure(name, dense / ours, "6", note)
    for kind in ACCESS_KINDS:
        dense, ours = on_ranks(_value_part, W, 1 << 19, kind, runs)[0]
        note = f"a table on each rank, dense gradients all-reduced; {ours * 1e3:.0f} ms"
        name = f"value part and selection: dense / ours, {W} ranks, N 512K, {kind}"
        yield Measure(name, dense / ours, "100", note)


def _selection(rank: int, num_slots: int, kind: str, runs: int) -> list[float]:
    """Return the seconds of the dense selection and of ours."""
    slots, df, owned, rule = _accesses(rank, num_slots, kind)
    of_all = slots.new_empty(W, *slots.shape)
    dist.all_gather(list(of_all.unbind()), slots)
    mine = of_all[(of_all >= owned.start) & (of_all < owned.stop)]

    def ours() -> Selection:
        return select(touched_slots([mine]), rule, 1, dist.group.WORLD)

    expected = set(_dense_selection(slots, df).tolist())
    assert len(expected - set(ours().ids.tolist())) < 0.5 * TOP_T, "they differ in ties alone"
    return median_seconds([lambda: _dense_selection(slots, df), ours], runs, at_least=0)


def _value_part(rank: int, num_slots: int, kind: str, runs: int) -> list[float]:
    """Return the seconds of lookup, selection, gradient and AdamW: dense, and ours."""
    slots, df, owned, rule = _accesses(rank, num_slots, kind)
    weights, grad_out = torch.rand(T, K), torch.randn(T, V) * 1e-3
    table = sharded_table(num_slots, V)
    table.values.requires_grad_(False)
    optimizer = RowAdamW(table, lr=0.1)
    values = torch.zeros(num_slots, V).requires_grad_()
    dense_optimizer = torch.optim.AdamW([values], fused=True)

    def ours() -> None:
        touched = touched_slots([owned.ids(table.count(slots))])
        ids = select(touched, rule, 1, table.group).ids.sort().values
        here = ids[(ids >= owned.start) & (ids < owned.stop)] - owned.start
        selected = table.select(here)
        table(slots, weights, None, selected)[0].backward(grad_out)
        optimizer.step(selected)

    def dense() -> None:
        values.grad = None
        output = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)
        output.backward(grad_out)
        dist.all_reduce(values.grad)
        update_rows(dense_optimizer, values, _dense_selection(slots, df))

    return median_seconds([dense, ours], runs, at_least=0)


def _accesses(
    rank: int, num_slots: int, kind: str
) -> tuple[Tensor, Tensor, OwnedSlots, SelectionRule]:
    """Return the slots this rank looks up, all document frequencies, its own slots, the rule."""
    torch.manual_seed(0)  # the same popular slots on every rank
    slots = random_slots(kind, num_slots, W * T, K)[rank * T : (rank + 1) * T]
    df = torch.randint(DOCUMENTS, (num_slots,), generator=torch.Generator().manual_seed(0))
    rows = num_slots // W
    owned = OwnedSlots(num_slots, rank * rows, (rank + 1) * rows)
    of_rank = df[owned.start : owned.stop]
    background = Background(owned, of_rank.int(), of_rank.long(), DOCUMENTS, int(df.sum()))
    return slots, df, owned, SelectionRule("tfidf", TOP_T, background=background)


def _dense_selection(slots: Tensor, df: Tensor) -> Tensor:
    counts = torch.bincount(slots.flatten(), minlength=len(df))
    dist.all_reduce(counts)
    scores = tfidf(counts, int(counts.sum()), df, DOCUMENTS)
    return scores.topk(TOP_T).indices
