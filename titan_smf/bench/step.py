"""Measures of whole sparse steps: time, memory and bytes, for growing tables.

A model of 8 layers of width 256, its memory in the middle, learns 500 rows a step. The plain
implementation that it is compared with does one pass over the batch, has a gradient of the whole
table, masks it to the same rows and lets dense AdamW update them.

T tokens of a rank, K slots per token, N slots, V value dim, W ranks, t rows learned
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from titan_smf.bench.measure import Measure, ReceivedBytes, median_seconds, on_ranks, peak_growth
from titan_smf.bench.sparse import OPTIMIZERS
from titan_smf.config.job import JobConfig, load_config
from titan_smf.data.tokenizer import load_tokenizer
from titan_smf.ops.routing import count_bytes, lookup_bytes
from titan_smf.sparse.ranking import selection_bytes
from titan_smf.sparse.row_optimizer import RowOptimizer

CONFIG = Path(__file__).parents[2] / "train_configs/debug_sparse_ft.toml"
T, K, V, TOP_T = 1024, 32, 256, 500
SIZES = {"64K": 256, "256K": 512, "1M": 1024}
"""n_keys by the number of slots, n_keys**2."""
SETTINGS = {
    "model.dim": 256,
    "model.n_layers": 8,
    "model.n_heads": 8,
    "model.ffn_dim": 704,
    "memory.layers": "[4]",
    "memory.heads": 4,
    "memory.k": K // 4,
    "memory.k_dim": 128,
    "memory.v_dim": V,
    "training.seq_len": 64,
    "selection.top_t": TOP_T,
    "selection.log": "false",
}
SIZES_NOTE = f"8 layers of width 256, {T} tokens a rank, t {TOP_T}, v_dim {V}"

Step = Callable[[], Any]


def whole_step(runs: int) -> list[Measure]:
    """Growth of time and memory with N, and both against the plain implementation."""
    return [*_time(runs), *_memory(), *step_bytes()]


def _time(runs: int) -> list[Measure]:
    measures = []
    for optimizer in OPTIMIZERS:
        steps: list[Step] = [_sparse_step(n_keys, optimizer) for n_keys in SIZES.values()]
        if optimizer == "AdamW":
            steps.append(_dense_step(SIZES["1M"]))
        seconds = dict(zip([*SIZES, "dense"], median_seconds(steps, runs), strict=False))
        measures += [
            _growth("time", seconds, size, f"{optimizer}, one process", "{:.0f} ms", 1e3)
            for size in ("256K", "1M")
        ]
        if "dense" in seconds:
            ratio = seconds["dense"] / seconds["1M"]
            note = f"{seconds['dense'] * 1e3:.0f} ms, dense gradient, mask, fused AdamW"
            measures.append(Measure("whole step: plain / ours, N 1M, time", ratio, "-", note))
    seconds = on_ranks(_times_on_rank, 2, runs)[0]
    where = "AdamW, 2 ranks"
    measures += [_growth("time", seconds, size, where, "{:.0f} ms", 1e3) for size in ("256K", "1M")]
    return measures


def _times_on_rank(rank: int, runs: int) -> dict[str, float]:
    steps = [_sparse_step(n_keys, "AdamW") for n_keys in SIZES.values()]
    # As many runs on every rank: a second's worth would differ.
    return dict(zip(SIZES, median_seconds(steps, runs, at_least=0), strict=True))


def _memory() -> list[Measure]:
    measures = []
    for optimizer in OPTIMIZERS:
        peaks = {
            size: float(max(on_ranks(_peak_of_steps, 1, n_keys, optimizer)))
            for size, n_keys in SIZES.items()
        }
        measures += [
            _growth("extra peak memory", peaks, size, optimizer, "{:.0f} MiB", 2**-20)
            for size in ("256K", "1M")
        ]
        if optimizer == "AdamW":
            dense = max(on_ranks(_peak_of_dense, 1, SIZES["1M"]))
            name = "whole step: plain / ours, N 1M, extra peak memory"
            note = f"{dense / 2**20:.0f} MiB; ours is mostly the activations of the model"
            measures.append(Measure(name, dense / peaks["1M"], "-", note))
    return measures


def _growth(
    what: str, values: dict[str, float], size: str, where: str, form: str, scale: float
) -> Measure:
    note = f"{form.format(values[size] * scale)}; {SIZES_NOTE}"
    name = f"whole sparse step, {what}: N {size} / N 64K, {where}"
    return Measure(name, values[size] / values["64K"], "1.2", note)


def _peak_of_steps(rank: int, n_keys: int, optimizer: str) -> int:
    """Of three steps on different batches, the first of this process with a table of this size."""
    _sparse_step(32, optimizer)()  # loads what the first use loads
    step = _sparse_step(n_keys, optimizer)
    return peak_growth(lambda: [step() for _ in range(3)])


def _peak_of_dense(rank: int, n_keys: int) -> int:
    _dense_step(32)()
    return peak_growth(_dense_step(n_keys))


def _sparse_step(n_keys: int, optimizer: str) -> Step:
    """A function that makes a whole sparse step, on another batch at each call."""
    from titan_smf.training.full_step import MicroBatch
    from titan_smf.training.loss import summed_cross_entropy
    from titan_smf.training.sparse_step import SparseStep

    model, config = _model(n_keys)
    model.requires_grad_(False)
    tables = list(model.value_tables())
    optimizers: list[RowOptimizer] = [OPTIMIZERS[optimizer](table) for table in tables]
    sparse_step = SparseStep(
        model, optimizers, config, summed_cross_entropy, contextlib.nullcontext, Path()
    )

    def step() -> None:
        tokens, labels = _batch()
        every = torch.ones_like(tokens, dtype=torch.bool)
        sparse_step.step([MicroBatch(tokens, labels, every, {})], T, 1)

    return step


def _dense_step(n_keys: int) -> Step:
    """The same update by one pass, dense counts, a dense gradient, a mask and a dense optimizer."""
    from titan_smf.training.loss import summed_cross_entropy

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
        mask = torch.zeros(table.num_slots, 1)
        mask[counts.topk(TOP_T).indices] = 1
        assert table.values.grad is not None
        table.values.grad.mul_(mask)
        optimizer.step()

    return step


def step_bytes() -> list[Measure]:
    """Bytes of all collectives of the step's work on the memory, against the formula."""
    measures = []
    for W in (2, 4):
        received = {size: on_ranks(_bytes_on_rank, W, n_keys) for size, n_keys in SIZES.items()}
        means = {size: sum(of_ranks) / W for size, of_ranks in received.items()}
        expected = sparse_step_bytes(T, K, V, W, 4, TOP_T)
        for size in SIZES:
            note = f"{means[size] / 2**20:.2f} MiB a rank, float32; {SIZES_NOTE}"
            name = f"whole sparse step, bytes / formula: N {size}, {W} ranks"
            measures.append(Measure(name, means[size] / expected, "0.98 to 1.02", note))
    return measures


def sparse_step_bytes(
    tokens: int,
    slots_per_token: int,
    v_dim: int,
    world_size: int,
    activation_bytes: int,
    top_t: int,
    micro_batches: int = 1,
) -> float:
    """Returns the bytes one of W ranks receives for one memory layer in a sparse step.

    For each micro-batch counting, the lookup, and the gradients of its outputs; the weights of the
    first memory layer's lookup need none. Once the selection of top_t slots, if each rank touched
    as many. The arguments are those of `lookup_bytes`: N is not among them.
    """
    T, K, W = tokens, slots_per_token, world_size
    there, back, _ = lookup_bytes(T, K, v_dim, W, activation_bytes)
    return micro_batches * (count_bytes(T, K, W) + there + back) + selection_bytes(W, top_t)


def _bytes_on_rank(rank: int, n_keys: int) -> int:
    torch.manual_seed(rank)
    step = _sparse_step(n_keys, "AdamW")
    with ReceivedBytes() as collectives:
        step()
    return collectives.received.total()


def _model(n_keys: int) -> tuple[Any, JobConfig]:
    """A model with random weights, and the configuration of a sparse run."""
    from titan_smf.model.llama import MemoryLlama
    from titan_smf.training.train_spec import model_args

    with tempfile.TemporaryDirectory() as folder:
        words = ["--job.config", str(CONFIG), "--job.dump_folder", folder]
        for key, value in (SETTINGS | {"memory.n_keys": n_keys}).items():
            words += [f"--{key}", str(value)]
        config = load_config(words)
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
