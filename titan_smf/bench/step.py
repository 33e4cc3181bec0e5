"""Measures of whole sparse steps: time, memory and bytes, for growing tables.

A model of 8 layers of width 256, its memory in the middle, learns 500 rows a step. The plain
implementation that it is compared with does one pass over the batch, has a gradient of the whole
table, masks it to the same rows and lets dense AdamW update them.

T tokens of a rank, K slots per token, N slots, V value dim, W ranks, t rows learned
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from titan_smf.bench.measure import (
    SETTINGS,
    Measure,
    ReceivedBytes,
    load_settings,
    median_seconds,
    on_ranks,
    peak_growth,
    update_rows,
)
from titan_smf.bench.sparse import OPTIMIZERS
from titan_smf.config.job import JobConfig
from titan_smf.data.tokenizer import load_tokenizer
from titan_smf.model.llama import MemoryLlama
from titan_smf.ops.routing import count_bytes, lookup_bytes
from titan_smf.sparse.ranking import selection_bytes
from titan_smf.sparse.row_optimizer import RowOptimizer
from titan_smf.training.full_step import MicroBatch
from titan_smf.training.loss import summed_cross_entropy
from titan_smf.training.sparse_step import SparseStep
from titan_smf.training.train_spec import model_args

T = 1024
K, V, TOP_T = 32, 256, 500  # as in settings.toml
TABLES = {"64K": 256, "256K": 512, "1M": 1024}
"""n_keys by the number of slots, n_keys**2."""
NOTE = f"8 layers of width 256, {T} tokens a rank, t {TOP_T}, v_dim {V}"

Step = Callable[[], Any]


def whole_step(runs: int) -> Iterator[Measure]:
    """Growth of time and memory with N, and both against the plain implementation."""
    yield from _time(runs)
    yield from _memory()
    yield from _step_bytes()


def _time(runs: int) -> Iterator[Measure]:
    for optimizer in OPTIMIZERS:
        steps = [build_sparse_step(n_keys, optimizer) for n_keys in TABLES.values()]
        plain = [build_dense_step(TABLES["1M"])] if optimizer == "AdamW" else []
        seconds = median_seconds(steps + plain, runs)
        ours = seconds[: len(TABLES)]
        yield from _growth("time", ours, f"{optimizer}, one process", "ms", 1e3)
        if plain:
            note = f"{seconds[-1] * 1e3:.0f} ms, dense gradient, mask, fused AdamW"
            ratio = seconds[-1] / ours[-1]
            yield Measure("whole step: plain / ours, N 1M, time", ratio, note=note)
    yield from _growth("time", on_ranks(_times_on_rank, 2, runs)[0], "AdamW, 2 ranks", "ms", 1e3)


def _times_on_rank(rank: int, runs: int) -> list[float]:
    steps = [build_sparse_step(n_keys, "AdamW") for n_keys in TABLES.values()]
    # As many runs on every rank: a second's worth would differ.
    return median_seconds(steps, runs, at_least=0)


def _memory() -> Iterator[Measure]:
    for optimizer in OPTIMIZERS:
        peaks = [
            on_ranks(_peak, 1, 3, build_sparse_step, n_keys, optimizer)[0]
            for n_keys in TABLES.values()
        ]
        yield from _growth("extra peak memory", peaks, optimizer, "MiB", 2**-20)
        if optimizer == "AdamW":
            (dense,) = on_ranks(_peak, 1, 1, build_dense_step, TABLES["1M"])
            name = "whole step: plain / ours, N 1M, extra peak memory"
            note = f"{dense / 2**20:.0f} MiB; ours is mostly the activations of the model"
            yield Measure(name, dense / peaks[-1], note=note)


def _growth(
    what: str, of_sizes: Sequence[float], where: str, unit: str, scale: float
) -> Iterator[Measure]:
    """Compare the costs of a step at each of TABLES with that at the first one."""
    for size, cost in list(zip(TABLES, of_sizes, strict=True))[1:]:
        name = f"whole sparse step, {what}: N {size} / N 64K, {where}"
        note = f"{cost * scale:.0f} {unit}; {NOTE}"
        yield Measure(name, cost / of_sizes[0], "1.2", note)


def _peak(rank: int, num_steps: int, build: Callable[..., Step], n_keys: int, *args: str) -> int:
    """Return the extra peak memory of a process's first steps, on different batches."""
    build(32, *args)()  # loads what the first use loads
    step = build(n_keys, *args)
    return peak_growth(lambda: [step() for _ in range(num_steps)])


def build_sparse_step(n_keys: int, optimizer: str) -> Step:
    """Return a function that makes a whole sparse step, on another batch at each call."""
    model, config = _model(n_keys)
    model.requires_grad_(False)
    tables = list(model.value_tables())
    optimizers: list[RowOptimizer] = [OPTIMIZERS[optimizer](table) for table in tables]
    sparse_step = SparseStep(
        model, optimizers, config, summed_cross_entropy, contextlib.nullcontext()
    )

    def step() -> None:
        tokens, labels = _batch()
        every = torch.ones_like(tokens, dtype=torch.bool)
        sparse_step.step([MicroBatch(tokens, labels, every, {})], T, 1)

    return step


def build_dense_step(n_keys: int) -> Step:
    """Return the same by one pass, dense counts, a dense gradient, a mask and dense AdamW."""
    model, _ = _model(n_keys)
    model.requires_grad_(False)
    (table,) = model.value_tables()
    table.values.requires_grad_()
    optimizer = torch.optim.AdamW([table.values], lr=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        tokens, labels = _batch()
        logits, accesses = model(tokens)
        (summed_cross_entropy(logits, labels) / T).backward()
        counts = torch.bincount(accesses[0], minlength=table.num_slots)
        update_rows(optimizer, table.values, counts.topk(TOP_T).indices)

    return step


def _step_bytes() -> Iterator[Measure]:
    """Bytes of all collectives of the step's work on the memory, against the formula."""
    for W, (size, n_keys) in itertools.product((2, 4), TABLES.items()):
        mean = sum(on_ranks(_bytes_on_rank, W, n_keys)) / W
        expected = sparse_step_bytes(T, K, V, W, 4, TOP_T)
        note = f"{mean / 2**20:.2f} MiB a rank, float32; {NOTE}"
        name = f"whole sparse step, bytes / formula: N {size}, {W} ranks"
        yield Measure(name, mean / expected, "0.98 to 1.02", note)


def sparse_step_bytes(
    tokens: int,
    slots_per_token: int,
    v_dim: int,
    world_size: int,
    activation_bytes: int,
    top_t: int,
    micro_batches: int = 1,
) -> float:
    """Return the bytes that one of W ranks receives for one memory layer in a sparse step.

    For each micro-batch: the counts, the lookup, and the gradients of its outputs; the weights of
    the first memory layer's lookup need none. Once: the selection of top_t slots, if each rank
    touched as many. The arguments are those of `lookup_bytes`: N is not among them.
    """
    T, K, W = tokens, slots_per_token, world_size
    there, back, _ = lookup_bytes(T, K, v_dim, W, activation_bytes)
    return micro_batches * (count_bytes(T, K, W) + there + back) + selection_bytes(W, top_t)


def _bytes_on_rank(rank: int, n_keys: int) -> int:
    torch.manual_seed(rank)
    step = build_sparse_step(n_keys, "AdamW")
    with ReceivedBytes() as collectives:
        step()
    return collectives.received.total()


def _model(n_keys: int) -> tuple[Any, JobConfig]:
    """Return a model with random weights, and the configuration of a sparse run."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_settings(
            "debug_sparse_ft", folder, SETTINGS["sparse_step"] | {"memory.n_keys": n_keys}
        )
    with torch.device("meta"):
        model = MemoryLlama(model_args(config, load_tokenizer("bytes")))
    if dist.is_initialized() and dist.get_world_size() > 1:
        for table in model.value_tables():
            table.shard(init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu").init_weights(torch.device("cpu"))
    return model, config


def _batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (T // 64, 65))
    return tokens[:, :-1], tokens[:, 1:]
