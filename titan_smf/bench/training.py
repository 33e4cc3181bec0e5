"""Measures of whole training steps: what the memory costs, and what our loop adds.

N slots, W ranks, V value dim
"""

import base64
import copy
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from titan_smf.bench.measure import Measure, on_ranks
from titan_smf.runtime import peak_resident_bytes

Kinds = dict[str, Callable[[str], list[float]]]
"""What is timed, by name: given a folder, it returns the seconds of its steps."""

ROOT = Path(__file__).parents[2]
# Sizes of torchtitan's own `llama3 debugmodel`, for our dense model.
TORCHTITAN_DEBUG = {
    "model.dim": 256,
    "model.n_layers": 6,
    "model.n_heads": 16,
    "model.ffn_dim": 768,
    "model.rope_theta": 500000,
    "memory.layers": "[]",
}
DEMO = {"model.flavor": "demo", "training.global_batch_size": 64, "training.seq_len": 64}
# Proportions of a real model: depth, memory in the middle, a vocabulary of its own weight.
MIDDLE = DEMO | {
    "model.dim": 256,
    "model.n_layers": 12,
    "model.n_heads": 8,
    "model.ffn_dim": 704,
    "memory.layers": "[6]",
    "memory.v_dim": 256,
    "tokenizer.name": "",  # a rank file
    "training.global_batch_size": 16,
}


def step_time(runs: int) -> list[Measure]:
    """Steps of the memory model, of the dense one, and of torchtitan's trainer, run in turns."""
    measures = []
    for ranks in (1, 2):
        batch = {"training.local_batch_size": 64 // ranks}
        times = on_ranks(_step_times, ranks, runs, DEMO | batch)[0]
        where = f"{ranks} ranks" if ranks > 1 else "one process"
        measures += [
            Measure(
                f"step: memory model / dense model of equal depth and width, {where}",
                times["memory"] / times["dense"],
                note=f"demo sizes, 4,096 tokens: {times['memory'] * 1e3:.0f} ms",
            ),
            Measure(
                f"step: our dense model and loop / torchtitan's, {where}",
                times["ours"] / times["torchtitan"],
                "1",
                f"its debug model, 4,096 tokens: {times['ours'] * 1e3:.0f} ms",
            ),
        ]
    return measures


def _step_times(rank: int, runs: int, settings: dict[str, Any]) -> dict[str, float]:
    same_sizes = settings | TORCHTITAN_DEBUG
    kinds: Kinds = {
        "memory": lambda folder: _ours(folder, settings),
        "dense": lambda folder: _ours(folder, settings | {"memory.layers": "[]"}),
        "ours": lambda folder: _ours(folder, same_sizes),
        "torchtitan": lambda folder: _torchtitan(folder, same_sizes),
    }
    return _median_times(kinds, runs)


def _median_times(kinds: Kinds, runs: int) -> dict[str, float]:
    """Median seconds of each kind; the kinds run in turns, each in a folder of its own."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(-(-runs // 3)):
        for kind, run in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                times[kind] += run(folder)
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def _config(folder: str, settings: dict[str, Any]) -> Any:
    from titan_smf.config.job import load_config

    fixed = {
        "job.dump_folder": folder,
        "training.steps": 8,
        "checkpoint.enable": "false",
        "validation.enable": "false",
        "metrics.enable_tensorboard": "false",
    }
    words = ["--job.config", str(ROOT / "train_configs/debug_pretrain.toml")]
    for key, value in (fixed | settings).items():
        words += [f"--{key}", str(value)]
    return load_config(words)


def _ours(folder: str, settings: dict[str, Any]) -> list[float]:
    """Seconds of each step but the first three."""
    from titan_smf.training.trainer import Trainer

    class Timed(Trainer):
        def train_step(self, data_iterator: Any) -> Any:
            return _timed(seconds, super().train_step, data_iterator)

    seconds: list[float] = []
    trainer = Timed(_config(folder, settings))
    trainer.train()
    trainer.close()
    return seconds[3:]


def _torchtitan(folder: str, settings: dict[str, Any]) -> list[float]:
    """The same of torchtitan's trainer and dense model, on the same batches."""
    from titan_smf.model.parallelize import reduce_by_plain_sums
    from titan_smf.torchtitan_api import get_train_spec, register_train_spec, torchtitan_train
    from titan_smf.training.train_spec import build_train_spec

    class Timed(torchtitan_train.Trainer):
        def train_step(self, data_iterator: Any) -> Any:
            return _timed(seconds, super().train_step, data_iterator)

    def parallelize(*args: Any) -> Any:
        model = get_train_spec().parallelize_fn(*args)
        reduce_by_plain_sums(model)
        return model

    seconds: list[float] = []
    config = _config(folder, settings)
    ours = build_train_spec(config)
    args: Any = copy.copy(get_train_spec().model_args["debugmodel"])
    args.vocab_size = cast(Any, ours.model_args[config.model.flavor]).vocab_size
    config.model.name, config.model.flavor = f"llama3 {folder}", "debugmodel"
    register_train_spec(
        config.model.name,
        dataclasses.replace(
            get_train_spec(),
            model_args={"debugmodel": args},
            parallelize_fn=parallelize,
            build_dataloader_fn=ours.build_dataloader_fn,
            build_tokenizer_fn=ours.build_tokenizer_fn,
        ),
    )
    trainer = Timed(config)
    trainer.train()
    trainer.close()
    return seconds[3:]


def _timed(seconds: list[float], step: Callable[[Any], Any], batches: Any) -> Any:
    begin = time.perf_counter()
    result = step(batches)
    seconds.append(time.perf_counter() - begin)
    return result


def finetuning(runs: int) -> list[Measure]:
    """A full finetuning step against a sparse one, and a forward pass against a counting one."""
    measures = []
    for sizes, note in (
        (DEMO, "demo sizes, memory in layer 2 of 4, 4,096 tokens"),
        (MIDDLE, "12 layers of width 256, memory in layer 6, vocabulary of 16,384, 1,024 tokens"),
    ):
        times = on_ranks(_finetuning_times, 1, runs, sizes)[0]
        measures += [
            Measure(
                "step: full finetuning / sparse, same model and batch",
                times["full"] / times["sparse"],
                "2",
                f"{note}, t 100: {times['sparse'] * 1e3:.0f} ms",
            ),
            Measure(
                "forward pass of the whole model / counting pass",
                times["forward"] / times["count"],
                "1.8",
                f"{note}: {times['count'] * 1e3:.0f} ms",
            ),
        ]
    return measures


def _finetuning_times(rank: int, runs: int, sizes: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = sizes | {
            "training.local_batch_size": sizes["training.global_batch_size"],
            "stream.path": "synthetic:world?facts=300&new_facts=40",
            "selection.ranking": "tf",
            "selection.top_t": 100,
        }
        if "tokenizer.name" in sizes:
            settings["tokenizer.path"] = _write_rank_file(Path(folder) / "large.tiktoken")
        sparse = settings | {"finetune.method": "sparse_memory"}
        kinds: Kinds = {
            "full": lambda folder: _ours(folder, settings),
            "sparse": lambda folder: _ours(folder, sparse),
            "forward": lambda folder: _forward_times(folder, settings, "all"),
            "count": lambda folder: _forward_times(folder, settings, "to_memory"),
        }
        return _median_times(kinds, runs)


def _write_rank_file(path: Path) -> str:
    """16,384 tokens: the bytes, and pairs that no text in ASCII has, so that it stays bytes."""
    pairs = itertools.product(range(128, 128 + 63), range(256))
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in pairs]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    path.write_text("\n".join(lines))
    return str(path)


def _forward_times(folder: str, settings: dict[str, Any], part: str) -> list[float]:
    """Seconds of forward passes without gradients, but the first three."""
    import torch

    from titan_smf.training.trainer import Trainer

    trainer = Trainer(_config(folder, settings))
    seconds: list[float] = []
    for inputs, _ in itertools.islice(trainer.dataloader, 8):
        with torch.no_grad():
            _timed(seconds, lambda tokens: trainer.model(tokens, part=part), inputs["input"])
    trainer.close()
    return seconds[3:]


def run_memory(runs: int) -> list[Measure]:
    """Peak memory that a whole run's table costs a rank, in multiples of its N/W rows."""
    V = 64
    without = {W: max(on_ranks(_peak_of_run, W, 32)) for W in (1, 4)}
    measures = []
    for W, n_keys in ((1, 512), (4, 512), (4, 1024), (1, 1024)):
        rows = n_keys**2 / W * V * 4
        extra = max(on_ranks(_peak_of_run, W, n_keys)) - without[W]
        measures.append(
            Measure(
                f"peak memory of a run / its rows of the table, N {n_keys**2 >> 10}K, W {W}",
                extra / rows,
                "4 to 6",
                f"{extra / 2**20:.0f} MiB; values, gradient and two moments are 4",
            )
        )
    return measures


def _peak_of_run(rank: int, n_keys: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        _ours(folder, {"memory.n_keys": n_keys, "training.steps": 3})
    return peak_resident_bytes()
