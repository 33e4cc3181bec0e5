"""The model has the sizes it says, and its initial weights depend on the seed alone."""

import copy

import pytest
import torch

from tests.support.launch import run_on_ranks
from titan_smf.model.args import FLAVORS, MemoryLlamaArgs
from titan_smf.model.llama import MemoryLlama


def sized(flavor: str, **memory: object) -> MemoryLlamaArgs:
    args = copy.deepcopy(FLAVORS[flavor])
    args.vocab_size, args.max_seq_len = 320, 32
    for name, value in memory.items():
        setattr(args.memory, name, value)
    return args


def built(args: MemoryLlamaArgs) -> MemoryLlama:
    with torch.device("meta"):
        return MemoryLlama(args)


def test_the_paper_model_has_the_papers_sizes() -> None:
    args = copy.deepcopy(FLAVORS["1.3B"])
    args.vocab_size = 128256
    counts = args.parameter_counts(built(args))
    dim, ffn, layers = 2048, 8192, 22
    attention, feed_forward, norms = 4 * dim**2, 3 * dim * ffn, 2 * dim
    query, keys, gates = dim * 4 * 512, 4 * 2 * 1024 * 256, 2 * dim * 1024
    dense = layers * (attention + norms) + (layers - 1) * feed_forward + dim
    dense += 2 * 128256 * dim + query + keys + gates
    assert counts.total == dense + 2**20 * 1024
    assert counts.active == dense + 4 * 32 * 1024


def test_flops_count_what_a_token_uses() -> None:
    args = sized("debug", layers=[1, 2])
    model = built(args)
    _, flops = args.get_nparams_and_flops(model, seq_len=32)
    counts = args.parameter_counts(model)
    table = 96**2 * 64
    assert counts.total - counts.active == table - 2 * 4 * 8 * 64  # shared: one table, read twice
    scores_and_mixing = 6 * 4 * 2 * 64 * 32
    assert flops == 6 * (counts.active - 320 * 64) + scores_and_mixing


@pytest.mark.parametrize(("share", "tables"), [(True, 1), (False, 2)])
def test_tables_are_shared_or_one_each(share: bool, tables: int) -> None:
    model = built(sized("debug", layers=[1, 3], share_values=share))
    values = [name for name, _ in model.named_parameters() if name.endswith("values")]
    assert values == [f"tables.{index}.values" for index in range(tables)]


def test_without_memory_layers_it_is_torchtitans_llama() -> None:
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    args = sized("debug", layers=[])
    args.ffn_dim = 192
    stock = TransformerModelArgs(
        dim=64, n_layers=4, n_heads=4, vocab_size=320, max_seq_len=32, rope_theta=10000
    )
    stock.ffn_dim_multiplier, stock.multiple_of = 1.13, 64  # gives 192
    theirs, ours = Transformer(stock), MemoryLlama(args)
    with torch.no_grad():
        theirs.init_weights()
    ours.init_weights()  # makes the rotary table, too
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(320, (2, 32))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens))


def initial_weights(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = built(sized("debug", layers=[1, 2], share_values=False))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        tables, model.tables = model.tables, torch.nn.ModuleList()
        fully_shard(model, mesh=mesh)
        model.tables = tables
        for table in model.value_tables():
            table.shard(mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(rank)  # must not matter
    model.init_weights()
    return {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in model.named_parameters()
    }


def test_initial_weights_are_the_same_for_any_number_of_ranks() -> None:
    one = run_on_ranks(initial_weights, 1)[0]
    for several in run_on_ranks(initial_weights, 3):
        assert several.keys() == one.keys()
        assert all(torch.equal(several[name], one[name]) for name in one)
    # Every part is drawn on its own: no two of the same shape are equal.
    assert not torch.equal(one["tables.0.values"], one["tables.1.values"])
    assert not torch.equal(one["layers.0.attention.wq.weight"], one["layers.3.attention.wq.weight"])
