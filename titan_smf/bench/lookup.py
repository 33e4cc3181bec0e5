"""Measures of the product-key search and of lookups in the value table.

T tokens, H heads, K slots per token, N slots, W ranks, V value dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from titan_smf.bench.measure import Measure, median_ratio, on_ranks, random_slots, resident_peak
from titan_smf.model.value_table import ValueTable
from titan_smf.ops.embedding_bag import bag_of_entry, weight_gradient
from titan_smf.ops.product_key import best_pairs, product_key_topk
from titan_smf.ops.routing import lookup_bytes
from titan_smf.ops.row_gradient import row_gradient

KINDS = ("uniform", "zipf")


def product_key(runs: int) -> list[Measure]:
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
    pairing = median_ratio(lambda: all_pairs(*halves), lambda: pruned_pairs(*halves), runs)
    lean = median_ratio(lambda: all_pairs_without_ids(*halves), lambda: pruned_pairs(*halves), runs)
    note = f"{T} tokens, {n_keys} keys, k {k}, k_dim {k_dim}"
    return [
        Measure("product-key search: plain two-stage / ours", plain, "1.6", note),
        Measure("  pairing stage alone: all pairs and ids / ours", pairing, "5"),
        Measure("  pairing stage alone: all pairs, ids of the best / ours", lean),
    ]


def forward(runs: int) -> list[Measure]:
    """The lookup on one process against torch's embedding bag, both ready for a backward pass."""
    T, K, N, V = 1024, 128, 1 << 18, 256
    measures = []
    for dtype in (torch.float32, torch.bfloat16):
        table = ValueTable(N, V, dtype)
        table.init_weights(seed=0)
        for kind in KINDS:
            slots = random_slots(kind, N, T, K)
            weights = torch.rand(T, K, dtype=dtype).requires_grad_()

            def plain(
                slots: Tensor = slots, weights: Tensor = weights, table: ValueTable = table
            ) -> Tensor:
                return F.embedding_bag(slots, table.values, mode="sum", per_sample_weights=weights)

            def ours(
                slots: Tensor = slots, weights: Tensor = weights, table: ValueTable = table
            ) -> Tensor:
                return table(slots, weights)[0]

            name = f"forward lookup / F.embedding_bag, {kind}, {str(dtype)[6:]}"
            note = f"{T} tokens, {K} slots each, N {N}, v_dim {V}"
            measures.append(Measure(name, median_ratio(ours, plain, runs), "<= 1.1", note))
    return measures


def backward(runs: int) -> list[Measure]:
    """Gradients of touched rows and weights against autograd's of a dense table, N = 1M."""
    N, V = 1 << 20, 256
    values = torch.zeros(N, V).requires_grad_()
    measures = []
    for T, K in ((1024, 32), (4096, 128)):
        for kind in KINDS:
            slots = random_slots(kind, N, T, K)
            weights = torch.rand(T, K).requires_grad_()
            grad_out = torch.randn(T, V)
            output = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)

            def plain(
                output: Tensor = output, weights: Tensor = weights, grad_out: Tensor = grad_out
            ) -> tuple[Tensor, ...]:
                return torch.autograd.grad(output, (values, weights), grad_out, retain_graph=True)

            def ours(
                slots: Tensor = slots, weights: Tensor = weights, grad_out: Tensor = grad_out
            ) -> tuple[Tensor, ...]:
                rows = slots.flatten()
                offsets = torch.arange(0, slots.numel(), slots.shape[1])
                bags = bag_of_entry(offsets, slots.numel())
                of_rows = row_gradient(rows, bags, weights.detach().flatten(), grad_out)
                return *of_rows, weight_gradient(values.detach(), rows, offsets, grad_out)

            touched = len(slots.unique())
            measures.append(
                Measure(
                    f"backward: dense gradient / ours over touched rows, {kind}",
                    median_ratio(plain, ours, runs),
                    "8" if T == 1024 else "-",
                    f"{T} tokens, {K} slots each, {touched} of {N} rows touched, v_dim {V}",
                )
            )
    return measures


def wire_bytes(runs: int) -> list[Measure]:
    """Bytes received by a rank in a lookup against the formula."""
    measures = []
    for world_size in (2, 4):
        ratios = on_ranks(_bytes_over_formula, world_size)
        for step, direction in enumerate(("forward", "backward")):
            worst = max((ratio[step] for ratio in ratios), key=lambda ratio: abs(ratio - 1))
            name = f"lookup bytes / formula, {direction}, {world_size} ranks"
            measures.append(Measure(name, worst, "0.98 to 1.02", "uniform slots, bf16, v_dim 128"))
    return measures


def _bytes_over_formula(rank: int) -> tuple[float, float]:
    T, K, N, V = 2048, 16, 1 << 14, 128
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(rank)
    table = _sharded_table(N, V)
    assert table.exchange is not None
    weights = torch.rand(T, K, dtype=torch.bfloat16).requires_grad_()
    output, _ = table(random_slots("uniform", N, T, K), weights)
    received = table.exchange.bytes_received
    output.sum().backward()
    forward, *backward = lookup_bytes(T, K, V, mesh.size(), 2)
    return received / forward, (table.exchange.bytes_received - received) / sum(backward)


def memory(runs: int) -> list[Measure]:
    """Peak memory of a rank's table and gradient, in multiples of its N/W rows."""
    V = 256
    measures = []
    for world_size, num_slots in ((1, 1 << 18), (2, 1 << 18), (2, 1 << 19), (4, 1 << 19)):
        extra = max(on_ranks(_peak_bytes, world_size, num_slots, V))
        own_rows = num_slots / world_size * V * 4
        name = (
            f"peak memory of a rank / its rows of the table, N {num_slots >> 10}K, W {world_size}"
        )
        note = f"{extra / 2**20:.0f} MiB for table and gradient"
        measures.append(Measure(name, extra / own_rows, "about 2", note))
    return measures


def _peak_bytes(rank: int, num_slots: int, v_dim: int) -> int:
    """How far a rank's peak rises from before the table is made until after a backward pass."""
    table = _sharded_table(1024, v_dim)  # loads what the first use loads
    _use(table)
    before = resident_peak()
    table = _sharded_table(num_slots, v_dim)
    _use(table)
    assert isinstance(table.values.grad, DTensor)
    return resident_peak() - before


def _sharded_table(num_slots: int, v_dim: int) -> ValueTable:
    with torch.device("meta"):
        table = ValueTable(num_slots, v_dim)
    table.shard(init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    table.to_empty(device="cpu").init_weights(seed=0)
    return table


def _use(table: ValueTable) -> None:
    slots = random_slots("uniform", table.num_slots, 64, 16)
    table(slots, torch.ones(slots.shape).requires_grad_())[0].sum().backward()
