"""Measures of the product-key search and of lookups in the value table.

T tokens, H heads, K slots per token, N slots, W ranks, V value dim
"""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from titan_smf.bench.measure import (
    ACCESS_KINDS,
    Measure,
    ReceivedBytes,
    median_ratio,
    on_ranks,
    peak_growth,
    random_slots,
)
from titan_smf.model.value_table import ValueTable
from titan_smf.ops.embedding_bag import bag_of_entry, weight_gradient
from titan_smf.ops.product_key import best_pairs, product_key_topk
from titan_smf.ops.routing import lookup_bytes
from titan_smf.ops.row_gradient import row_gradient


def product_key(runs: int) -> Iterator[Measure]:
    """The search against two full top-k's and all k * k pairs with their ids, as published."""
    T, H, n_keys, k, k_dim = 1024, 4, 1024, 32, 512
    query, keys = torch.randn(T, H, k_dim), torch.randn(2, H, n_keys, k_dim // 2)

    def all_pairs(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        pair_ids = (ids[0].unsqueeze(-1) * n_keys + ids[1].unsqueeze(-2)).flatten(-2)
        best, pair = (scores[0].unsqueeze(-1) + scores[1].unsqueeze(-2)).flatten(-2).topk(k)
        return best, pair_ids.gather(-1, pair)

    def all_pairs_without_ids(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        best, pair = (scores[0].unsqueeze(-1) + scores[1].unsqueeze(-2)).flatten(-2).topk(k)
        return best, ids[0].gather(-1, pair // k) * n_keys + ids[1].gather(-1, pair % k)

    def pruned_pairs(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ranks = best_pairs(scores)
        first, second = ids.gather(-1, ranks)
        return scores.gather(-1, ranks).sum(0), first * n_keys + second

    def half_scores() -> Tensor:
        halves = query.view(T, H, 2, k_dim // 2).permute(2, 1, 0, 3)
        return torch.matmul(halves, keys.transpose(2, 3))

    halves = half_scores().topk(k)
    plain = median_ratio(
        lambda: all_pairs(*half_scores().topk(k)), lambda: product_key_topk(query, keys, k), runs
    )
    note = f"{T} tokens, {n_keys} keys, k {k}, k_dim {k_dim}"
    yield Measure("product-key search: plain two-stage / ours", plain, "1.6", note)
    pairing = median_ratio(lambda: all_pairs(*halves), lambda: pruned_pairs(*halves), runs)
    yield Measure("  pairing stage alone: all pairs and ids / ours", pairing, "5")
    lean = median_ratio(lambda: all_pairs_without_ids(*halves), lambda: pruned_pairs(*halves), runs)
    yield Measure("  pairing stage alone: all pairs, ids of the best / ours", lean)


def forward(runs: int) -> Iterator[Measure]:
    """The lookup on one process against torch's embedding bag, both ready for a backward pass."""
    T, K, N, V = 1024, 128, 1 << 18, 256

    def ratio() -> float:
        return median_ratio(
            lambda: table(slots, weights)[0],
            lambda: F.embedding_bag(slots, table.values, mode="sum", per_sample_weights=weights),
            runs,
        )

    for dtype in (torch.float32, torch.bfloat16):
        table = ValueTable(N, V, dtype)
        table.init_weights(seed=0)
        for kind in ACCESS_KINDS:
            slots = random_slots(kind, N, T, K)
            weights = torch.rand(T, K, dtype=dtype).requires_grad_()
            name = f"forward lookup / F.embedding_bag, {kind}, {str(dtype)[6:]}"
            note = f"{T} tokens, {K} slots each, N {N}, v_dim {V}"
            yield Measure(name, ratio(), "<= 1.1", note)


def backward(runs: int) -> Iterator[Measure]:
    """Gradients of touched rows and weights against autograd's of a dense table, N = 1M."""
    N, V = 1 << 20, 256
    values = torch.zeros(N, V).requires_grad_()

    def plain() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, (values, weights), grad_out, retain_graph=True)

    def ours() -> tuple[Tensor, ...]:
        rows = slots.flatten()
        offsets = torch.arange(0, slots.numel(), slots.shape[1])
        bags = bag_of_entry(offsets, slots.numel())
        of_rows = row_gradient(rows, bags, weights.detach().flatten(), grad_out)
        return *of_rows, weight_gradient(values.detach(), rows, offsets, grad_out)

    for (T, K, target), kind in itertools.product(
        ((1024, 32, "8"), (4096, 128, "-")), ACCESS_KINDS
    ):
        slots = random_slots(kind, N, T, K)
        weights = torch.rand(T, K).requires_grad_()
        grad_out = torch.randn(T, V)
        output = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)
        touched = len(slots.unique())
        name = f"backward: dense gradient / ours over touched rows, {kind}"
        note = f"{T} tokens, {K} slots each, {touched} of {N} rows touched, v_dim {V}"
        yield Measure(name, median_ratio(plain, ours, runs), target, note)


def received_bytes(runs: int) -> Iterator[Measure]:
    """Bytes that a rank receives in a lookup, against the formula."""
    for W in (2, 4):
        ratios = on_ranks(_bytes_over_formula, W)
        for step, direction in enumerate(("forward", "backward")):
            worst = max((ratio[step] for ratio in ratios), key=lambda ratio: abs(ratio - 1))
            name = f"lookup bytes / formula, {direction}, {W} ranks"
            yield Measure(name, worst, "0.98 to 1.02", "uniform slots, bf16, v_dim 128")


def _bytes_over_formula(rank: int) -> tuple[float, float]:
    T, K, N, V = 2048, 16, 1 << 14, 128
    torch.manual_seed(rank)
    table = sharded_table(N, V)
    weights = torch.rand(T, K, dtype=torch.bfloat16).requires_grad_()
    slots = random_slots("uniform", N, T, K)
    with ReceivedBytes() as there:
        output, _ = table(slots, weights)
    with ReceivedBytes() as back:
        output.sum().backward()
    forward, *backward = lookup_bytes(T, K, V, dist.get_world_size(), 2)
    return there.received.total() / forward, back.received.total() / sum(backward)


def memory(runs: int) -> Iterator[Measure]:
    """Peak memory of a rank's table and gradient, in multiples of its N/W rows."""
    V = 256
    for W, N in ((1, 1 << 18), (2, 1 << 18), (2, 1 << 19), (4, 1 << 19)):
        extra = max(on_ranks(_peak_bytes, W, N, V))
        name = f"peak memory of a rank / its rows of the table, N {N >> 10}K, W {W}"
        note = f"{extra / 2**20:.0f} MiB for table and gradient"
        yield Measure(name, extra / (N / W * V * 4), "about 2", note)


def _peak_bytes(rank: int, num_slots: int, v_dim: int) -> int:
    """Return the extra peak memory of making a table, a lookup, and its backward pass."""
    _use(sharded_table(1024, v_dim))  # loads what the first use loads
    return peak_growth(lambda: _use(sharded_table(num_slots, v_dim)))


def sharded_table(num_slots: int, v_dim: int) -> ValueTable:
    """Return a table with random values, split over all ranks."""
    with torch.device("meta"):
        table = ValueTable(num_slots, v_dim)
    table.shard(init_device_mesh("cpu", (dist.get_world_size(),)))
    table.to_empty(device="cpu").init_weights(seed=0)
    return table


def _use(table: ValueTable) -> None:
    slots = random_slots("uniform", table.num_slots, 64, 16)
    table(slots, torch.ones(slots.shape).requires_grad_())[0].sum().backward()
    assert isinstance(table.values.grad, DTensor)
