"""Selected sets equal a plain numpy computation on any number of ranks; ties go to the lower id."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.sparse.test_accesses import check_usage_over_shards_and_replicas_equals_numpy
from tests.support.launch import run_on_ranks
from titan_smf.model.value_table import ValueTable
from titan_smf.sparse.accesses import (
    OwnedSlots,
    TouchedSlots,
    sum_over_replicas,
    touched_slots,
)
from titan_smf.sparse.document_frequency import Background
from titan_smf.sparse.ranking import (
    Ranking,
    Selection,
    SelectionRule,
    kl,
    make_keys,
    overlap,
    random_scores,
    select,
    selected_access_share,
    split_keys,
    tf,
    tfidf,
    verify_selection,
)

N = 49  # slots of a table: 1, 2, 3 and 4 ranks, unevenly
LAYERS = 2
SEQUENCES, LENGTH, K = 24, 5, 3
DOCUMENTS = 6
SEED = 7
RANKINGS: list[Ranking] = ["tfidf", "tf", "kl", "random", "all"]
TOP_T = [*range(1, 40, 3), 10_000]

Rows = list[tuple[int, float, int]]
"""A selection as (id, score, count) in rank order."""


def make_batch(step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Slots (LAYERS, SEQUENCES, LENGTH, K) and which tokens count (SEQUENCES, LENGTH)."""
    random = np.random.default_rng(step)
    slots = np.minimum(random.geometric(0.08, (LAYERS, SEQUENCES, LENGTH, K)) - 1, N - 1)
    counted = np.arange(LENGTH) < random.integers(1, LENGTH + 1, (SEQUENCES, 1))
    slots[:, ~counted] = 48  # padding reads one slot again and again
    return slots, counted


def make_background(num_tables: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Few different values, so that scores are often equal; 0 and all documents among them."""
    random = np.random.default_rng(num_tables)
    df = random.choice([0, 2, DOCUMENTS], num_tables * N).astype(np.int32)
    return df, df.astype(np.int64) * random.choice([1, 40], num_tables * N)


def plain_order(step: int, num_tables: int, ranking: Ranking) -> Rows:
    """All touched slots, best first, from all accesses at once, one slot at a time."""
    slots, counted = make_batch(step)
    tables = np.arange(LAYERS).reshape(-1, 1, 1, 1) % num_tables
    counts = np.bincount((slots + tables * N)[:, counted].flatten(), minlength=num_tables * N)
    df, background_counts = make_background(num_tables)
    total, background_total = counts.sum(), background_counts.sum()
    ranked = []
    for slot in np.flatnonzero(counts):
        p = counts[slot] / total
        p_bg = (background_counts[slot] + 1) / (background_total + 1)
        score = {
            "tfidf": p * np.log((DOCUMENTS + 1) / (df[slot] + 1)),
            "tf": p,
            "all": p,
            "kl": p * np.log(p / p_bg),
            "random": plain_random(SEED, step, int(slot)),
        }[ranking]
        ranked.append((-np.float32(score), int(slot), int(counts[slot])))
    ranked.sort()
    return [(slot, float(-score), count) for score, slot, count in ranked]


def plain_random(seed: int, step: int, slot: int) -> float:
    """SplitMix64, in Python's whole numbers."""

    def mix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    return (mix(mix(mix(seed) + step) + slot) >> 40) / 2**24


def rows_of(selection: Selection) -> Rows:
    columns = selection.ids.tolist(), selection.scores.tolist(), selection.counts.tolist()
    return list(zip(*columns, strict=True))


def groups_of(mesh: DeviceMesh | None) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The shard group and the replicate group, as far as there are others in them."""
    if mesh is None:
        return None, None
    if mesh.ndim == 1:
        return (mesh.get_group() if mesh.size() > 1 else None), None
    return mesh.get_group(1), mesh.get_group(0)


def accesses_of_step(
    mesh: DeviceMesh | None, num_tables: int, step: int, micro_batches: int
) -> tuple[OwnedSlots, list[Tensor]]:
    """Runs this rank's sequences through sharded tables, as layers do."""
    tables = [ValueTable(N, 2) for _ in range(num_tables)]
    for table in tables:
        torch.nn.init.zeros_(table.values)
        if mesh is not None:
            table.shard(mesh)
    owned = OwnedSlots(N, *tables[0].row_range, num_tables)
    slots, counted = map(torch.from_numpy, make_batch(step))
    rank, world_size = 0, 1
    if mesh is not None:
        rank, world_size = mesh.mesh.flatten().tolist().index(dist.get_rank()), mesh.size()
    accesses = []
    for part in range(micro_batches):
        mine = slice(rank * micro_batches + part, None, world_size * micro_batches)
        for layer in range(LAYERS):
            index = layer % num_tables
            slots_TK = slots[layer, mine].reshape(-1, K)
            _, rows = tables[index](slots_TK, slots_TK.float(), counted[mine].flatten())
            accesses.append(owned.ids(rows, index))
    return owned, accesses


def background_of(owned: OwnedSlots) -> Background:
    df, counts = (
        torch.from_numpy(whole).view(owned.num_tables, N)[:, owned.start : owned.stop].flatten()
        for whole in make_background(owned.num_tables)
    )
    total = int(make_background(owned.num_tables)[1].sum())
    return Background(owned, df, counts, DOCUMENTS, total)


def check_selections(mesh: DeviceMesh | None) -> None:
    """Every ranking and t, one table and one per layer, with and without gradient accumulation."""
    shards, replicas = groups_of(mesh)
    for step, num_tables, micro_batches in [(1, 1, 1), (2, LAYERS, 1), (3, LAYERS, 2)]:
        owned, accesses = accesses_of_step(mesh, num_tables, step, micro_batches)
        touched = sum_over_replicas(touched_slots(accesses), replicas)
        background = background_of(owned)
        for ranking in RANKINGS:
            order = plain_order(step, num_tables, ranking)
            for top_t in TOP_T:
                rule = SelectionRule(ranking, top_t, SEED, background)
                got = select(touched, rule, step, shards)
                want = order if ranking == "all" else order[:top_t]
                assert rows_of(got) == want, f"{ranking}, t={top_t}, {num_tables} tables"
                assert got.num_touched == len(order)
                assert got.total == sum(count for _, _, count in order)
            verify_selection(got, accesses, owned, rule, step, shards, replicas)
    check_differences_are_found(got, accesses, owned, shards, replicas)


def check_differences_are_found(
    selection: Selection,
    accesses: list[Tensor],
    owned: OwnedSlots,
    shards: dist.ProcessGroup | None,
    replicas: dist.ProcessGroup | None,
) -> None:
    """`selection` is one of ranking `all` in step 3."""

    def changed(**fields: Any) -> Selection:
        return Selection(**(vars(selection) | fields))

    swapped = selection.ids.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    higher = selection.scores.clone()
    higher[2] = torch.nextafter(higher[2], torch.tensor(1.0))
    rule = SelectionRule("all", 1, SEED)
    wrong = {
        rf"rank 3 of the order there is slot {swapped[3]} .* not slot {swapped[4]} ": changed(
            ids=swapped
        ),
        "rank 2 of the order": changed(scores=higher),
        "rank 0 of the order": changed(counts=selection.counts + 1),
        f"{len(swapped) - 1} slots are selected, not {len(swapped)}": changed(
            ids=swapped[1:], scores=higher[1:], counts=selection.counts[1:]
        ),
        f"total is {selection.total + 1}, not {selection.total}": changed(
            total=selection.total + 1
        ),
    }
    for message, tampered in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            verify_selection(tampered, accesses, owned, rule, 3, shards, replicas)


def check_nothing_touched(mesh: DeviceMesh) -> None:
    shards, replicas = groups_of(mesh)
    none = sum_over_replicas(touched_slots([torch.empty(0, dtype=torch.int32)]), replicas)
    for ranking in RANKINGS:
        rule = SelectionRule(ranking, 5, SEED, background_of(OwnedSlots(N, 0, 0)))
        got = select(none, rule, 1, shards)
        assert rows_of(got) == []
        assert (got.total, selected_access_share(got), overlap(got.ids, got.ids)) == (0, 0, 0)


class Sizes(TorchDispatchMode):
    """Records the bytes given to collectives and the largest tensor made by any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if func.namespace == "c10d":
            self.sent += sum(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.data_ptr() not in given:
                self.largest = max(self.largest, made.numel())
        return result


def check_sizes_do_not_depend_on_slots(mesh: DeviceMesh) -> None:
    """The same 40 touched slots of each rank, of 1K and of 4M slots."""
    shards, replicas = groups_of(mesh)
    measured = []
    for num_slots in (1 << 10, 1 << 22):
        size = mesh.size(mesh.ndim - 1)
        start = mesh.get_local_rank(mesh.ndim - 1) * num_slots // size
        owned = OwnedSlots(num_slots, start, start + num_slots // size)
        zeros = torch.zeros(len(owned), dtype=torch.int64)
        background = Background(owned, zeros.int(), zeros, 1, 0)
        rows = torch.arange(40).repeat_interleave(3)
        with Sizes() as sizes:
            touched = sum_over_replicas(touched_slots([owned.ids(rows)]), replicas)
            for ranking in RANKINGS:
                select(touched, SelectionRule(ranking, 10, SEED, background), 1, shards)
        measured.append((sizes.sent, sizes.largest))
    assert measured[0] == measured[1]
    assert measured[0][0] > 0
    assert measured[0][1] < 1000


def check_on_meshes(rank: int, world_size: int) -> list[str]:
    """Meshes of 1, 2, 3 and 4 of the ranks, and two replicas of two."""
    checked = []
    for layout in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [[0, 1], [2, 3]], [[0], [1]]):
        names = ("fsdp",) if isinstance(layout[0], int) else ("dp_replicate", "fsdp")
        mesh = DeviceMesh("cpu", torch.tensor(layout), mesh_dim_names=names)
        if mesh.get_coordinate() is None:
            continue
        check_selections(mesh)
        check_nothing_touched(mesh)
        if mesh.size() == 4:
            check_sizes_do_not_depend_on_slots(mesh)
            if mesh.ndim == 2:
                check_usage_over_shards_and_replicas_equals_numpy(mesh)
        checked.append(str(layout))
    return checked


def test_selections_and_usage_equal_numpy_on_1_to_4_ranks_and_replicas() -> None:
    results = run_on_ranks(check_on_meshes, 4)
    assert [len(checked) for checked in results] == [6, 5, 3, 2]


def test_selections_without_process_group_equal_numpy() -> None:
    check_selections(None)


def test_forced_ties_are_there() -> None:
    """What the other tests rely on: equal scores at the last place, and negative ones."""
    for ranking in ("tfidf", "tf", "kl"):
        rows = plain_order(2, LAYERS, ranking)
        tied = [t for t in TOP_T if t < len(rows) and rows[t - 1][1] == rows[t][1]]
        assert tied, f"{ranking}: no tie at any t"
    assert min(score for _, score, _ in rows) < 0 < max(score for _, score, _ in rows)


def test_keys_order_by_score_then_lower_id() -> None:
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    scores = [np.inf, 3.5, 2**-99, smallest, 0.0, -0.0, -smallest, -(2**-99), -2.0, -np.inf]
    ids = torch.tensor([0, 5, 2**31 - 1])
    pairs = [(float(s), int(i)) for s in scores for i in ids]
    keys = make_keys(torch.tensor([s for s, _ in pairs]).double(), ids.repeat(len(scores)))
    assert sorted(pairs, key=lambda pair: (-pair[0], pair[1])) == [
        pairs[place] for place in keys.argsort(descending=True)
    ]
    back, back_ids = split_keys(keys)
    assert back.tolist() == [s for s, _ in pairs]
    assert back_ids.tolist() == [i for _, i in pairs]
    assert not torch.signbit(back[back == 0]).any(), "there is one zero"


def test_scores_do_not_depend_on_their_place_in_a_tensor() -> None:
    """Vectorised logarithms may round otherwise than single ones; ranks hold different slices."""
    counts = torch.arange(1, 1004) % 97 + 1
    df, background = torch.arange(1003) % 101, torch.arange(1003) % 89
    whole = tfidf(counts, 12345, df, 100), kl(counts, 12345, background, 54321)
    for size in (1, 2, 3, 5, 7, 17, 100):
        for parts, of_all in (
            ([tfidf(c, 12345, d, 100) for c, d in split_both(counts, df, size)], whole[0]),
            ([kl(c, 12345, b, 54321) for c, b in split_both(counts, background, size)], whole[1]),
        ):
            assert torch.equal(torch.cat(parts), of_all)


def split_both(a: Tensor, b: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a.split(size), b.split(size), strict=True))


def test_a_slot_in_every_document_scores_exactly_zero() -> None:
    for documents in range(1, 2000):
        counts = torch.ones(1, dtype=torch.int64)
        assert tfidf(counts, 3, torch.tensor([documents]), documents).item() == 0
    assert tfidf(counts, 4, torch.tensor([0]), 9).item() == pytest.approx(0.25 * np.log(10))
    assert tf(torch.tensor([1, 3]), 4).tolist() == [0.25, 0.75]


def test_kl_of_unseen_slots_is_finite_and_of_equal_shares_zero() -> None:
    counts, background = torch.tensor([5, 5, 1]), torch.tensor([0, 49, 79])
    scores = kl(counts, 10, background, 99)
    assert scores[0].item() == pytest.approx(0.5 * np.log(0.5 / 0.01))
    assert scores[1].item() == 0
    assert scores[2] < 0


def test_random_scores_are_even_and_change_with_step_and_seed() -> None:
    ids = torch.arange(100_000)
    scores = random_scores(ids, 1, 0)
    assert scores[[0, 7]].tolist() == [plain_random(0, 1, 0), plain_random(0, 1, 7)]
    expected = len(ids) / 20
    assert scores.histc(20, 0, 1).sub(expected).abs().max() < 5 * expected**0.5
    for other in (random_scores(ids, 2, 0), random_scores(ids, 1, 1), random_scores(ids + 1, 1, 0)):
        assert abs(torch.corrcoef(torch.stack([scores, other]))[0, 1]) < 0.015


def test_share_and_overlap() -> None:
    touched = TouchedSlots(torch.tensor([2, 4, 9]), torch.tensor([5, 1, 2]))
    two, three = (select(touched, SelectionRule("tf", t), 0) for t in (2, 3))
    assert two.ids.tolist() == [2, 9]
    assert selected_access_share(two) == 7 / 8
    assert (overlap(two.ids, three.ids), overlap(three.ids, two.ids)) == (1, 2 / 3)
