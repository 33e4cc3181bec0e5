"""Measures of a sparse step's work on four ranks, against each rank doing it for all slots.

T tokens, K slots per token, N slots, V value dim, W ranks, t rows learned
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from titan_smf.bench.measure import Measure, median_seconds, on_ranks, random_slots
from titan_smf.model.value_table import ValueTable
from titan_smf.sparse.accesses import OwnedSlots, touched_slots
from titan_smf.sparse.document_frequency import Background
from titan_smf.sparse.ranking import Selection, SelectionRule, select, tfidf
from titan_smf.sparse.row_optimizer import RowAdamW

T, K, V, W, TOP_T = 1024, 32, 256, 4, 500
DOCUMENTS = 1000


def ranks(runs: int) -> list[Measure]:
    """The selection, and the whole value part of a step; medians of the first rank."""
    measures = []
    for kind in ("uniform", "zipf"):
        dense, ours = on_ranks(_selection, W, 1 << 20, kind, runs)[0]
        note = f"{T} tokens a rank, {K} slots each, t {TOP_T}: {ours * 1e3:.1f} ms"
        name = f"selection: dense counts, all-reduce / ours, {W} ranks, N 1M, {kind}"
        measures.append(Measure(name, dense / ours, "6", note))
    for kind in ("uniform", "zipf"):
        dense, ours = on_ranks(_value_part, W, 1 << 19, kind, runs)[0]
        note = f"a table on each rank, dense gradients all-reduced; {ours * 1e3:.0f} ms"
        name = f"value part and selection: dense / ours, {W} ranks, N 512K, {kind}"
        measures.append(Measure(name, dense / ours, "100", note))
    return measures


def _selection(rank: int, num_slots: int, kind: str, runs: int) -> list[float]:
    """Seconds of the dense selection and of ours."""
    slots = _slots(rank, num_slots, kind)
    of_all = slots.new_empty(W, *slots.shape)
    dist.all_gather(list(of_all.unbind()), slots)
    owned = _owned(rank, num_slots)
    mine = of_all[(of_all >= owned.start) & (of_all < owned.stop)]
    df = torch.randint(DOCUMENTS, (num_slots,), generator=torch.Generator().manual_seed(0))
    rule = SelectionRule("tfidf", TOP_T, background=_background(df, owned))

    def ours() -> Selection:
        return select(touched_slots([mine]), rule, 1, dist.group.WORLD)

    expected = set(_dense_selection(slots, df).tolist())
    assert len(expected - set(ours().ids.tolist())) < 0.5 * TOP_T, "they differ in ties alone"
    return median_seconds([lambda: _dense_selection(slots, df), ours], runs, at_least=0)


def _value_part(rank: int, num_slots: int, kind: str, runs: int) -> list[float]:
    """Seconds of lookup, selection, gradient and AdamW: dense, and ours."""
    slots, weights = _slots(rank, num_slots, kind), torch.rand(T, K)
    grad_out = torch.randn(T, V) * 1e-3
    df = torch.randint(DOCUMENTS, (num_slots,), generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        table = ValueTable(num_slots, V)
    table.values.requires_grad_(False)
    table.shard(init_device_mesh("cpu", (W,)))
    table.to_empty(device="cpu").init_weights(seed=0)
    optimizer, owned = RowAdamW(table, lr=0.1), _owned(rank, num_slots)
    rule = SelectionRule("tfidf", TOP_T, background=_background(df, owned))
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
        assert values.grad is not None
        dist.all_reduce(values.grad)
        mask = torch.zeros(num_slots, 1)
        mask[_dense_selection(slots, df)] = 1
        values.grad.mul_(mask)
        dense_optimizer.step()

    return median_seconds([dense, ours], runs, at_least=0)


def _slots(rank: int, num_slots: int, kind: str) -> Tensor:
    torch.manual_seed(0)  # the same popular slots on every rank
    return random_slots(kind, num_slots, W * T, K)[rank * T : (rank + 1) * T]


def _dense_selection(slots: Tensor, df: Tensor) -> Tensor:
    counts = torch.bincount(slots.flatten(), minlength=len(df))
    dist.all_reduce(counts)
    scores = tfidf(counts, int(counts.sum()), df, DOCUMENTS)
    return scores.topk(TOP_T).indices


def _owned(rank: int, num_slots: int) -> OwnedSlots:
    rows = num_slots // W
    return OwnedSlots(num_slots, rank * rows, (rank + 1) * rows)


def _background(df: Tensor, owned: OwnedSlots) -> Background:
    of_rank = df[owned.start : owned.stop]
    return Background(owned, of_rank.int(), of_rank.long(), DOCUMENTS, int(df.sum()))
