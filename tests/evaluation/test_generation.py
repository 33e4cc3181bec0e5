"""The cached forward pass is the plain one; answers do not depend on batch or placement."""

import copy
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.launch import run_on_ranks

PROMPTS = ["Q: who?\nA:", "x", "Where is it that the river ends?", "Q: a\nA:", "12"]
PROMPTS += ["Q: b c\nA:", "é"]
KINDS: dict[str, dict[str, Any]] = {
    "one memory": {},
    "shared table": {"layers": [1, 2]},
    "table each": {"layers": [0, 3], "share_values": False},
    "dense": {"layers": []},
    "grouped heads": {"n_kv_heads": 2},
}


def evaluated(ranks: int, replicas: int = 1, **sizes: Any) -> Any:
    """A float64 debug model with random weights that speaks variedly, placed on all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from titan_smf.data.tokenizer import load_tokenizer
    from titan_smf.evaluation.evaluated_model import EvaluatedModel
    from titan_smf.model.args import FLAVORS
    from titan_smf.model.llama import MemoryLlama
    from titan_smf.runtime import StopRequest

    args = copy.deepcopy(FLAVORS["debug"])
    args.vocab_size, args.max_seq_len, args.memory.value_dtype = 320, 96, "float64"
    for name, value in sizes.items():
        setattr(args if hasattr(args, name) else args.memory, name, value)
    with torch.device("meta"):
        model = MemoryLlama(args).double()
    if ranks > 1:
        names = ("dp_replicate", "fsdp")
        mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=names)
        mesh = mesh if replicas > 1 else mesh["fsdp"]
        tables, model.tables = model.tables, torch.nn.ModuleList()
        for part in (model.tok_embeddings, *model.layers.values(), model):
            fully_shard(part, mesh=mesh)
        model.tables = tables
        for table in model.value_tables():
            table.shard(mesh)
    model.to_empty(device="cpu")
    model.init_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("norm.weight") and "tables" not in name:
                weight.mul_(8)  # far from uniform: no near ties
    return EvaluatedModel(
        model, load_tokenizer("bytes"), torch.device("cpu"), nullcontext(), "default", StopRequest()
    )


def plain_texts(host: Any, prompts: Sequence[str], stop: Sequence[str], limit: int) -> list[str]:
    """Each prompt alone, whole at every token."""
    texts = []
    for prompt in prompts:
        tokens = host.tokenizer.encode(prompt, bos=True)
        start = len(tokens)
        with torch.no_grad():
            for _ in range(limit):
                logits = host.model(torch.tensor([tokens]))[0][0, -1]
                token = int(logits[: host.tokenizer.n_vocab].argmax())
                if token == host.tokenizer.eos_id:
                    break
                tokens.append(token)
        text = host.tokenizer.decode(tokens[start:])
        for end in stop:
            text = text.partition(end)[0]
        texts.append(text.strip())
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_the_logits_of_the_plain_forward_pass(kind: str) -> None:
    from titan_smf.model.key_value_cache import KeyValueCache

    model = evaluated(1, **KINDS[kind]).model
    lengths = torch.tensor([5, 1, 9, 7])
    sequences = [torch.randint(320, (20,)) for _ in lengths]
    cache, rows = KeyValueCache(lengths, 17), [0, 1, 2, 3]
    tokens = torch.zeros(4, 9, dtype=torch.long)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        tokens[row, :length] = sequence[:length]
    with torch.no_grad():
        for step in range(8):
            logits = model(tokens, cache=cache)[0]
            for row, got in zip(rows, logits, strict=True):
                whole = model(sequences[row][None, : lengths[row] + step])[0][0, -1]
                torch.testing.assert_close(got, whole, rtol=0, atol=1e-10)
            if step == 3:
                cache.keep(torch.tensor([0, 2]))
                rows = [0, 2]
            tokens = torch.stack([sequences[row][lengths[row] + step] for row in rows])[:, None]


BATCH_SIZES = (2, 64)


def generated(rank: int, ranks: int, replicas: int) -> dict[str, Any]:
    from titan_smf.evaluation.generate import generate
    from titan_smf.evaluation.likelihood import Continuation, negative_log_likelihoods

    found: dict[str, Any] = {}
    for kind, batch_size in itertools.product(KINDS, BATCH_SIZES):
        host = evaluated(ranks, replicas, **KINDS[kind])
        prompts = [host.tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
        with host.open():
            texts = generate(host, prompts, ["e", "q"], 12, batch_size)
            continuations = [Continuation(tokens, 1 + len(tokens) // 2) for tokens in prompts[:1]]
            continuations += [Continuation([*tokens, 65, 66], len(tokens)) for tokens in prompts]
            likelihoods = negative_log_likelihoods(host, continuations, batch_size)
        assert host.model.training
        sharded = {isinstance(weight, DTensor) for weight in host.model.parameters()}
        assert sharded == {ranks > 1}, "nothing stays gathered"
        found[f"{kind}, {batch_size}"] = texts, likelihoods
        if ranks == 1:
            found[f"{kind}, plain"] = plain_texts(host, PROMPTS, ["e", "q"], 12)
    return found


def test_results_do_not_depend_on_batch_or_placement() -> None:
    one = run_on_ranks(generated, 1, 1)[0]
    placements = {"2": (2, 1), "3": (3, 1), "2x2": (4, 2)}
    placed = {where: run_on_ranks(generated, *sizes) for where, sizes in placements.items()}
    for kind in KINDS:
        texts, likelihoods = one[f"{kind}, 64"]
        assert texts == one[f"{kind}, plain"]
        assert len(set(texts)) > 2, "a model that says different things"
        for batch_size, (where, ranks) in itertools.product(BATCH_SIZES, placed.items()):
            for found in ranks:
                their_texts, theirs = found[f"{kind}, {batch_size}"]
                assert their_texts == texts, (kind, batch_size, where)
                assert theirs == pytest.approx(likelihoods, rel=0, abs=1e-10)


def test_batches_hold_every_item_once_and_bound_their_tokens() -> None:
    from titan_smf.evaluation.evaluated_model import MOST_TOKENS, batches_by_length

    lengths = [3, MOST_TOKENS * 2, 100, MOST_TOKENS // 2, 1, 100]
    batches = batches_by_length(lengths, 3)
    assert batches == [[1], [3, 2], [5, 0, 4]]
    assert batches_by_length([], 3) == []
