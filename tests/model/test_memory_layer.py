"""The memory layer equals its equation, sharded as on one process, compiled as eager."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tests.support.launch import run_on_ranks
from titan_smf.model.memory_layer import MemoryLayer
from titan_smf.model.value_table import ValueTable

DIM, N_KEYS, HEADS, K, K_DIM, V_DIM = 10, 5, 2, 3, 8, 6
B, S = 2, 4
TOLERANCE = 1e-12


def make_layer(qk_norm: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> MemoryLayer:
    torch.manual_seed(seed)
    layer = MemoryLayer(DIM, N_KEYS, HEADS, K, K_DIM, V_DIM, qk_norm).to(dtype)
    layer.init_weights(init_std=0.02)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)  # far from the start, where all slots are alike
    return layer


def make_table(mesh: DeviceMesh | None = None, dtype: torch.dtype = torch.float64) -> ValueTable:
    table = ValueTable(N_KEYS**2, V_DIM, dtype)
    table.init_weights(seed=5)
    if mesh is not None:
        table.shard(mesh)
    return table


def make_input(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states, mask of tokens that count, and output gradient of one rank."""
    generator = torch.Generator().manual_seed(rank)
    x, gradient = torch.randn(2, B, S, DIM, generator=generator, dtype=torch.float64)
    return x, torch.rand(B, S, generator=generator) < 0.7, gradient


def equation(layer: MemoryLayer, values: Tensor, x: Tensor) -> Tensor:
    """The layer written down over all N slots: scores of those not among the k best are -inf."""
    query = layer.query(x).view(*x.shape[:-1], HEADS, 2, K_DIM // 2)
    keys = layer.keys.view(2, HEADS, N_KEYS, K_DIM // 2)
    scale = 1.0
    if layer.query_gain is not None:
        query = query * (query.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.query_gain
        keys = keys * (keys.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        scale = (K_DIM / 2) ** -0.5
    first = torch.einsum("bshd,hnd->bshn", query[..., 0, :], keys[0])
    second = torch.einsum("bshd,hnd->bshn", query[..., 1, :], keys[1])
    scores = ((first.unsqueeze(-1) + second.unsqueeze(-2)) * scale).flatten(-2)
    worst = scores.topk(K).values[..., -1:]
    share = scores.masked_fill(scores < worst, -torch.inf).softmax(-1).sum(-2)
    gate = x @ layer.gate.weight.T
    y = share @ values
    return (y * gate * gate.sigmoid()) @ layer.output.weight.T


def close(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_output_and_gradients_equal_the_equation(qk_norm: bool) -> None:
    layer, table = make_layer(qk_norm), make_table()
    x, _, gradient = make_input(0)
    x.requires_grad_()
    variables = [x, table.values, *layer.parameters()]
    output, _ = layer(x, table)
    expected = equation(layer, table.values, x)
    assert close(output, expected)
    gradients = torch.autograd.grad(output, variables, gradient)
    expected_gradients = torch.autograd.grad(expected, variables, gradient)
    assert all(map(close, gradients, expected_gradients))


def test_slots_and_weights_of_a_head_stand_together() -> None:
    layer = make_layer(qk_norm=True)
    x = make_input(0)[0]
    slots, weights = layer.address(x)
    assert slots.shape == weights.shape == (B * S, HEADS * K)
    torch.testing.assert_close(
        weights.view(-1, HEADS, K).sum(-1), torch.ones(B * S, HEADS, dtype=x.dtype)
    )
    assert all(len(set(head)) == K for head in slots.view(-1, K).tolist())


def test_padding_is_not_among_the_accesses() -> None:
    layer, table = make_layer(qk_norm=False), make_table()
    x, counted, _ = make_input(0)
    everything = layer(x, table)[0]
    output, accesses = layer(x, table, counted)
    assert torch.equal(output, everything), "padding is read all the same"
    expected = layer.address(x)[0][counted.flatten()]
    assert sorted(accesses.tolist()) == sorted(expected.flatten().tolist())


def test_initial_parameters_have_the_published_spread() -> None:
    torch.manual_seed(0)
    layer = MemoryLayer(64, 32, 4, 8, 16, 64, qk_norm=True)
    layer.requires_grad_(False).init_weights(init_std=0.005)
    bound = 16**-0.5
    assert bound * 0.99 < layer.keys.abs().max() <= bound
    assert layer.keys.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert layer.query.weight.std() == pytest.approx(0.02, rel=0.05)
    assert layer.gate.weight.std() == pytest.approx(0.02, rel=0.05)
    assert layer.output.weight.std() == pytest.approx(0.005, rel=0.05)
    assert layer.query_gain is not None
    assert (layer.query_gain == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_normalised_addresses_do_not_depend_on_the_size_of_queries_and_keys(
    dtype: torch.dtype,
) -> None:
    layer = make_layer(qk_norm=True, dtype=dtype)
    x = make_input(0)[0].to(dtype)
    slots, weights = layer.address(x)
    with torch.no_grad():
        layer.query.weight.mul_(2**-4)  # powers of 2 change no rounding
        layer.keys.mul_(2**-5)
    smaller_slots, smaller_weights = layer.address(x)
    agree = (slots.sort(-1)[0] == smaller_slots.sort(-1)[0]).double().mean()
    assert agree > 0.95
    assert (weights.amax(-1) - smaller_weights.amax(-1)).abs().median() < 0.01


def test_bfloat16_and_autocast_stay_close() -> None:
    layer, table = make_layer(True, dtype=torch.float32), make_table(dtype=torch.float32)
    x = make_input(0)[0].float()
    exact = layer(x, table)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x, table)[0]
    layer.bfloat16()
    low = layer(x.bfloat16(), table)[0]
    assert mixed.dtype == low.dtype == torch.bfloat16
    # A slot at the border of the k best may be another one: most outputs are close, not all.
    for output in (mixed, low):
        assert (output - exact).abs().median() < 0.03 * exact.abs().median()
    low.sum().backward()
    assert table.values.grad is not None
    assert table.values.grad.dtype == torch.float32


@pytest.mark.launches
def test_compiled_equals_eager() -> None:
    layer, table = make_layer(qk_norm=True), make_table()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin)
    for seed in (0, 1):
        x, counted, gradient = make_input(seed)
        expected, accesses = layer(x, table, counted)
        output, compiled_accesses = compiled(x, table, counted)
        assert close(output, expected)
        assert torch.equal(compiled_accesses, accesses)
        expected.backward(gradient)
        output.backward(gradient)
    pairs = zip(twin.parameters(), layer.parameters(), strict=True)
    assert all(close(a.grad, b.grad) for a, b in pairs)


def two_layers(first: MemoryLayer, second: MemoryLayer, table: ValueTable, x: Tensor) -> Tensor:
    x = x + first(x, table)[0]
    return x + second(x, table)[0]


def check_equals_one_process(rank: int, world_size: int) -> None:
    """Two layers share a table: output and summed gradients are those of the whole batch."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    for recompute in (False, True):
        layers = make_layer(True, 1), make_layer(False, 2)
        table = make_table(mesh)
        x, _, gradient = make_input(rank)
        x.requires_grad_()
        if recompute:
            output = checkpoint(two_layers, *layers, table, x, use_reentrant=False)
        else:
            output = two_layers(*layers, table, x)
        output.backward(gradient)

        whole = make_layer(True, 1), make_layer(False, 2)
        whole_table = make_table()
        inputs = [make_input(r) for r in range(world_size)]
        whole_x = torch.cat([case[0] for case in inputs]).requires_grad_()
        expected = two_layers(*whole, whole_table, whole_x)
        expected.backward(torch.cat([case[2] for case in inputs]))
        mine = slice(rank * B, (rank + 1) * B)
        assert close(output, expected[mine])
        assert whole_x.grad is not None
        assert close(x.grad, whole_x.grad[mine])
        assert whole_table.values.grad is not None
        assert isinstance(table.values.grad, DTensor)
        rows = slice(*table.row_range)
        assert close(table.values.grad.to_local(), whole_table.values.grad[rows])
        for layer, whole_layer in zip(layers, whole, strict=True):
            for (name, p), q in zip(
                layer.named_parameters(), whole_layer.parameters(), strict=True
            ):
                assert p.grad is not None
                dist.all_reduce(p.grad)
                assert close(p.grad, q.grad), name


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_two_layers_on_one_sharded_table_equal_one_process(world_size: int) -> None:
    run_on_ranks(check_equals_one_process, world_size)
