"""Product-key search finds the k best of all n_keys**2 slots, as scoring every slot would."""

import pytest
import torch
from torch import Tensor

from titan_smf.ops import product_key
from titan_smf.ops.product_key import GROUP, best_pairs, product_key_topk

T, H, K_DIM = 6, 2, 6
SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (7, 1), (7, 7), (8, 3), (32, 32), (61, 5)]
SIZES += [(64, 8), (63, 7), (256, 4), (256, 32)]  # enough for groups of half-keys, or just not


def make_query_and_keys(n_keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n_keys)
    return torch.randn(T, H, K_DIM).to(dtype), torch.randn(2, H, n_keys, K_DIM // 2).to(dtype)


def all_scores(query: Tensor, keys: Tensor) -> Tensor:
    """(T, H, N): every slot's score."""
    first, second = query.chunk(2, dim=-1)
    scores_1 = torch.einsum("thd,hnd->thn", first, keys[0])
    scores_2 = torch.einsum("thd,hnd->thn", second, keys[1])
    return (scores_1.unsqueeze(-1) + scores_2.unsqueeze(-2)).flatten(-2)


@pytest.mark.parametrize(("n_keys", "k"), SIZES)
def test_finds_the_k_best_of_all_slots(n_keys: int, k: int) -> None:
    query, keys = make_query_and_keys(n_keys)
    scores, slots = product_key_topk(query, keys, k)
    best = all_scores(query, keys).topk(k)
    order = scores.argsort(-1, descending=True)
    torch.testing.assert_close(scores.gather(-1, order), best.values, rtol=0, atol=1e-12)
    assert torch.equal(slots.gather(-1, order), best.indices)
    assert slots.dtype == torch.int64


def test_sizes_cover_both_ways_of_searching_a_half() -> None:
    grouped = [n % GROUP == 0 and n >= 8 * k for n, k in SIZES]
    assert any(grouped)
    assert not all(grouped)


@pytest.mark.parametrize(("n_keys", "k"), [(7, 7), (64, 8)])
def test_gradients_equal_those_of_the_gathered_scores(n_keys: int, k: int) -> None:
    query, keys = (tensor.requires_grad_() for tensor in make_query_and_keys(n_keys))
    scores, slots = product_key_topk(query, keys, k)
    upstream = torch.randn_like(scores)
    gradients = torch.autograd.grad(scores, (query, keys), upstream)
    chosen = all_scores(query, keys).gather(-1, slots)
    expected = torch.autograd.grad(chosen, (query, keys), upstream)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)


def test_many_tokens_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys = make_query_and_keys(8)
    expected = product_key_topk(query, keys, 3)
    monkeypatch.setattr(product_key, "BLOCK_SCORES", 4 * keys.shape[:3].numel())  # 4 and 2 tokens
    for actual, whole in zip(product_key_topk(query, keys, 3), expected, strict=True):
        torch.testing.assert_close(actual, whole, rtol=0, atol=1e-12)
    monkeypatch.setattr(product_key, "BLOCK_SCORES", 1)  # never less than a token
    assert torch.equal(product_key_topk(query, keys, 3)[1], expected[1])


def test_no_tokens_give_no_slots() -> None:
    query, keys = make_query_and_keys(64)
    scores, slots = product_key_topk(query[:0], keys, 8)
    assert scores.shape == slots.shape == (0, H, 8)


def test_tied_scores_give_distinct_slots_with_the_best_scores() -> None:
    torch.manual_seed(0)
    query = torch.ones(T, H, 2)
    for n_keys, k in ((5, 4), (64, 8)):
        keys = torch.randint(3, (2, H, n_keys, 1)).float()
        scores, slots = product_key_topk(query, keys, k)
        every = all_scores(query, keys)
        assert torch.equal(scores.sort(-1, descending=True)[0], every.topk(k).values)
        assert torch.equal(every.gather(-1, slots), scores), "the slots have these scores"
        assert all(len(set(row)) == k for row in slots.flatten(0, 1).tolist())
        again = product_key_topk(query[:1], keys, k)[1]
        assert torch.equal(slots[:1], again), "whatever the other tokens are"


def test_low_precision_halves_are_added_in_float32() -> None:
    query, keys = make_query_and_keys(64, torch.bfloat16)
    scores, slots = product_key_topk(query, keys, 8)
    assert scores.dtype == torch.float32
    exact = all_scores(query.double(), keys.double())
    assert (scores - exact.gather(-1, slots)).abs().max() < 0.05
    assert (scores.amin(-1) - exact.topk(8).values[..., -1]).abs().max() < 0.05


def test_best_pairs_of_descending_lists() -> None:
    halves = torch.randn(2, 50, 9).sort(-1, descending=True)[0]
    sums = halves.gather(-1, best_pairs(halves)).sum(0)
    every = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(-2)
    assert torch.equal(sums.sort(-1, descending=True)[0], every.topk(9).values)


@pytest.mark.launches
def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(product_key_topk, fullgraph=True)
    query, keys = make_query_and_keys(64)
    for tokens in (T, T - 1):
        scores, slots = compiled(query[:tokens], keys, 8)
        expected = product_key_topk(query[:tokens], keys, 8)
        torch.testing.assert_close(scores, expected[0])
        assert torch.equal(slots, expected[1])
