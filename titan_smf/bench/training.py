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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from titan_smf.bench.measure import SETTINGS, Measure, load_settings, on_ranks, resident_peak
from titan_smf.config.job import JobConfig
from titan_smf.model.parallelize import reduce_by_plain_sums
from titan_smf.torchtitan_api import get_train_spec, register_train_spec, torchtitan_train
from titan_smf.training.train_spec import build_train_spec
from titan_smf.training.trainer import Trainer

Settings = dict[str, Any]


def step_time(runs: int) -> Iterator[Measure]:
    """Steps of the memory model, of the dense one, and of torchtitan's trainer, run in turns."""
    for W, where in ((1, "one process"), (2, "2 ranks")):
        settings = SETTINGS["demo"] | {"training.local_batch_size": 64 // W}
        seconds = on_ranks(_step_times, W, runs, settings)[0]
        yield Measure(
            f"step: memory model / dense model of equal depth and width, {where}",
            seconds["memory"] / seconds["dense"],
            note=f"demo sizes, 4,096 tokens: {seconds['memory'] * 1e3:.0f} ms",
        )
        yield Measure(
            f"step: our dense model and loop / torchtitan's, {where}",
            seconds["ours"] / seconds["torchtitan"],
            "1",
            f"its debug model, 4,096 tokens: {seconds['ours'] * 1e3:.0f} ms",
        )


def _step_times(rank: int, runs: int, settings: Settings) -> dict[str, float]:
    same_sizes = settings | SETTINGS["torchtitan_debug"]
    return _median_seconds(
        runs,
        memory=(_ours, settings),
        dense=(_ours, settings | {"memory.layers": []}),
        ours=(_ours, same_sizes),
        torchtitan=(_torchtitan, same_sizes),
    )


def _median_seconds(
    runs: int, **timed: tuple[Callable[[JobConfig], list[float]], Settings]
) -> dict[str, float]:
    """Call functions with their settings in turns; return the median of each one's seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(-(-runs // 3)):
        for name, (function, settings) in timed.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[name] += function(_config(folder, settings))
    return {name: statistics.median(of_all) for name, of_all in seconds.items()}


def _config(folder: str, settings: Settings) -> JobConfig:
    return load_settings("debug_pretrain", folder, SETTINGS["short_run"] | settings)


def _ours(config: JobConfig, trainer_class: type[Any] = Trainer) -> list[float]:
    """Train; return the seconds of each step after the third."""

    class Timed(trainer_class):
        def train_step(self, data_iterator: Any) -> Any:
            return _timed(seconds, super().train_step, data_iterator)

    seconds: list[float] = []
    trainer = Timed(config)
    trainer.train()
    trainer.close()
    return seconds[3:]


def _torchtitan(config: JobConfig) -> list[float]:
    """Return the same for torchtitan's trainer and dense model, on the same batches."""

    def parallelize(*args: Any) -> Any:
        model = get_train_spec().parallelize_fn(*args)
        reduce_by_plain_sums(model)
        return model

    ours = build_train_spec(config)
    args: Any = copy.copy(get_train_spec().model_args["debugmodel"])
    args.vocab_size = cast(Any, ours.model_args[config.model.flavor]).vocab_size
    config.model.name, config.model.flavor = f"llama3 {config.job.dump_folder}", "debugmodel"
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
    return _ours(config, torchtitan_train.Trainer)


def _timed(seconds: list[float], step: Callable[[Any], Any], batches: Any) -> Any:
    begin = time.perf_counter()
    result = step(batches)
    seconds.append(time.perf_counter() - begin)
    return result


def finetuning(runs: int) -> Iterator[Measure]:
    """A full finetuning step against a sparse one, and a forward pass against a counting one."""
    for sizes, note in (
        ("demo", "demo sizes, memory in layer 2 of 4, 4,096 tokens"),
        ("middle", "12 layers of width 256, memory in layer 6, vocabulary of 16,384, 1,024 tokens"),
    ):
        seconds = on_ranks(_finetuning_times, 1, runs, SETTINGS[sizes])[0]
        yield Measure(
            "step: full finetuning / sparse, same model and batch",
            seconds["full"] / seconds["sparse"],
            "2",
            f"{note}, t 100: {seconds['sparse'] * 1e3:.0f} ms",
        )
        yield Measure(
            "forward pass of the whole model / counting pass",
            seconds["forward"] / seconds["count"],
            "1.8",
            f"{note}: {seconds['count'] * 1e3:.0f} ms",
        )


def _finetuning_times(rank: int, runs: int, sizes: Settings) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = sizes | {
            "training.local_batch_size": sizes["training.global_batch_size"],
            "stream.path": "synthetic:world?facts=300&new_facts=40",
            "selection.ranking": "tf",
            "selection.top_t": 100,
        }
        if "tokenizer.name" in sizes:
            settings["tokenizer.path"] = _write_rank_file(Path(folder) / "large.tiktoken")
        return _median_seconds(
            runs,
            full=(_ours, settings),
            sparse=(_ours, settings | {"finetune.method": "sparse_memory"}),
            forward=(partial(_forward, part="all"), settings),
            count=(partial(_forward, part="to_memory"), settings),
        )


def _write_rank_file(path: Path) -> str:
    """16,384 tokens: the bytes, and pairs that no text in ASCII has, so that it stays bytes."""
    pairs = itertools.product(range(128, 128 + 63), range(256))
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in pairs]
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    path.write_text("\n".join(lines))
    return str(path)


def _forward(config: JobConfig, part: str) -> list[float]:
    """Return the seconds of each forward pass without gradients after the third."""
    trainer = Trainer(config)
    seconds: list[float] = []
    for inputs, _ in itertools.islice(trainer.dataloader, 8):
        with torch.no_grad():
            _timed(seconds, lambda tokens: trainer.model(tokens, part=part), inputs["input"])
    trainer.close()
    return seconds[3:]


def run_memory(runs: int) -> Iterator[Measure]:
    """Peak memory that a whole run's table costs a rank, in multiples of its N/W rows."""
    V = 64
    without = {W: max(on_ranks(_peak_of_run, W, 32)) for W in (1, 4)}
    for W, n_keys in ((1, 512), (4, 512), (4, 1024), (1, 1024)):
        extra = max(on_ranks(_peak_of_run, W, n_keys)) - without[W]
        yield Measure(
            f"peak memory of a run / its rows of the table, N {n_keys**2 >> 10}K, W {W}",
            extra / (n_keys**2 / W * V * 4),
            "4 to 6",
            f"{extra / 2**20:.0f} MiB; values, gradient and two moments are 4",
        )


def _peak_of_run(rank: int, n_keys: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        _ours(_config(folder, {"memory.n_keys": n_keys, "training.steps": 3}))
    return resident_peak()
