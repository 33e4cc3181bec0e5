"""Checks of settings, each by itself and together, before anything of a run is built.

What depends on more than settings is checked where it is used: a flavor's sizes by the model, names
and paths by the tokenizer and the data.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from titan_smf.config.job import JobConfig
from titan_smf.config.parsing import get, settings_of
from titan_smf.config.refused import refusal
from titan_smf.config.sections import Source
from titan_smf.errors import ConfigError

_ALLOWED_SOURCES = "at least one table {path = ..., weight = ...}, with a path and a weight above 0"

_AT_LEAST_ONE = {
    "training": ("steps", "local_batch_size", "seq_len", "gc_freq"),
    "model": ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim"),
    "memory": ("n_keys", "heads", "k", "k_dim", "v_dim"),
    "validation": ("freq", "local_batch_size", "seq_len"),
    "parallelism": ("data_parallel_replicate_degree",),
    "comm": ("init_timeout_seconds", "train_timeout_seconds"),
    "checkpoint": ("interval",),
    "selection": ("top_t",),
    "lora": ("rank",),
    "stream": ("epochs", "steps_per_record"),
    "idf": ("num_batches", "batch_size", "seq_len", "checkpoint_interval"),
    "analysis": ("limit",),
    "evaluation": ("max_new_tokens", "batch_size", "seq_len", "resamples"),
    "metrics": ("log_freq",),
    "profiling": ("profile_freq",),
}
_NOT_NEGATIVE = {
    "optimizer": ("lr", "weight_decay", "eps"),
    "memory": ("value_lr", "value_weight_decay"),
    "lr_scheduler": ("warmup_steps",),
    "checkpoint": ("keep_latest_k",),
    "evaluation": ("interval",),
    "debug": ("seed",),
    "idf": ("first_batch",),
}
_BETAS = {"optimizer": ("beta1", "beta2")}
_FRACTIONS = {"lr_scheduler": ("decay_ratio", "min_lr_factor")}
_BOUNDS = (
    (_AT_LEAST_ONE, 1, sys.float_info.max, "1 or more"),
    (_NOT_NEGATIVE, 0, sys.float_info.max, "0 or more"),
    (_BETAS, 0, math.nextafter(1, 0), "from 0 to below 1"),
    (_FRACTIONS, 0, 1, "from 0 to 1"),
)

Condition = tuple[str, bool, str]  # (key, whether its value can be used, what is allowed)


def check(config: JobConfig, world_size: int, trains: bool = True) -> None:
    """Raise a ConfigError for the first setting that cannot work, by itself or with the others.

    Args:
        world_size: number of ranks of the run.
        trains: whether there must be something to train on.
    """
    conditions = [  # each may rely on those before it
        _supported(config),
        _in_bounds(config),
        _training_conditions(config),
        _model_and_data_conditions(config),
        _rank_conditions(config, world_size),
        _data_conditions(config, world_size) if trains else (),
    ]
    for key, holds, allowed in chain.from_iterable(conditions):
        if not holds:
            raise ConfigError(key, get(config, key), allowed, config.origin(key))


def _supported(config: JobConfig) -> Iterator[Condition]:
    default = JobConfig()
    for key in settings_of(JobConfig):
        instead = refusal(key)
        if instead is not None:
            expected = get(default, key)
            yield key, get(config, key) == expected, f"{expected!r}; {instead}"


def _in_bounds(config: JobConfig) -> Iterator[Condition]:
    for table, low, high, allowed in _BOUNDS:
        for key in (f"{section}.{name}" for section in table for name in table[section]):
            value = get(config, key)
            yield key, value is None or low <= value <= high, allowed


def _training_conditions(config: JobConfig) -> Iterator[Condition]:
    training, checkpoint, components = config.training, config.checkpoint, config.compile.components
    names = ("AdamW", "SGD") if config.finetune.method == "sparse_memory" else ("Adam", "AdamW")
    yield "optimizer.name", config.optimizer.name in names, " or ".join(names)
    yield "training.max_norm", training.max_norm > 0, "more than 0; inf does not clip"
    length = config.lr_scheduler.total_steps
    fits = length is None or length >= training.steps
    allowed = (
        f"training.steps ({training.steps}) or more: past its end the rate would turn negative"
    )
    yield "lr_scheduler.total_steps", fits, allowed
    types = {training.dtype, training.mixed_precision_param, training.mixed_precision_reduce}
    allowed = (
        "float64 in all of training.dtype, mixed_precision_param and mixed_precision_reduce, "
        "or in none of them"
    )
    yield "training.dtype", "float64" not in types or len(types) == 1, allowed
    known = ["model", "loss"]
    yield "compile.components", set(components) <= set(known), f"{known}"
    option = config.activation_checkpoint.selective_ac_option
    is_option = option == "op" or (option.isdecimal() and int(option) >= 1)
    allowed = '"op", or n as a string for every n-th block'
    yield "activation_checkpoint.selective_ac_option", is_option, allowed
    has_budget = config.compile.enable and "model" in components
    usable = has_budget or config.activation_checkpoint.mode != "memory_budget"
    allowed = "selective, full or none: memory_budget needs compile.enable"
    yield "activation_checkpoint.mode", usable, allowed
    steps, load_step = config.validation.steps, checkpoint.load_step
    yield "validation.steps", steps == -1 or steps >= 1, "1 or more, or -1 for all the data"
    yield from _profiling_conditions(config)
    has_weights = not checkpoint.initial_patches or bool(checkpoint.initial_load_path)
    allowed = "[], or checkpoint.initial_load_path beside it: the weights that the patches change"
    yield "checkpoint.initial_patches", has_weights, allowed
    yield "checkpoint.load_step", load_step >= -1, "the number of a step, or -1 for the latest"


def _profiling_conditions(config: JobConfig) -> Iterator[Condition]:
    profiling, has_gpu = config.profiling, torch.accelerator.is_available()
    traced = "false on a CPU: the profiler traces a GPU"
    yield "profiling.enable_profiling", has_gpu or not profiling.enable_profiling, traced
    kept = "false on a CPU: the snapshots are of a GPU's memory"
    yield "profiling.enable_memory_snapshot", has_gpu or not profiling.enable_memory_snapshot, kept
    cycle = profiling.profiler_active + profiling.profiler_warmup
    fits = not profiling.enable_profiling or profiling.profile_freq >= cycle
    allowed = f"profiler_active + profiler_warmup ({cycle}) or more"
    yield "profiling.profile_freq", fits, allowed


def _model_and_data_conditions(config: JobConfig) -> Iterator[Condition]:
    layers = config.memory.layers or []
    yield "model.name", config.model.name == "memory_llama", "memory_llama"
    yield "memory.layers", len(set(layers)) == len(layers), "each block once"
    ranking = config.selection.ranking
    has_counts = not config.needs_counts or bool(config.selection.idf_path)
    allowed = (
        f"the file of tools/compute_idf.py for this model: selection.ranking {ranking} needs it"
    )
    yield "selection.idf_path", has_counts, allowed
    yield "analysis.sizes", all(size >= 1 for size in config.analysis.sizes), "1 or more each"
    allowed = "more than 0: adapters are multiplied by alpha / rank"
    yield "lora.alpha", 0 < config.lora.alpha < math.inf, allowed
    default = JobConfig()
    for key in ("lora.rank", "lora.alpha", "lora.targets"):
        value = get(default, key)
        usable = config.finetune.method == "lora" or get(config, key) == value
        yield key, usable, f'{value!r}, or finetune.method = "lora"'
    has_data = bool(config.data.validation) or not config.validation.enable
    yield "data.validation", has_data, "a path, because validation.enable is true"


def _data_conditions(config: JobConfig, world_size: int) -> Iterator[Condition]:
    sources, replay, training = config.data.sources, config.replay, config.training
    has_data = bool(sources or config.stream.path)
    yield "data.sources", has_data and _are_usable(sources), _ALLOWED_SOURCES
    yield "replay.share", 0 <= replay.share < 1, "from 0, for none, to below 1"
    yield "replay.sources", _are_usable(replay.sources), _ALLOWED_SOURCES
    if replay.share == 0:
        return
    allowed = "0 without stream.path: what data.sources mix, their weights say"
    yield "replay.share", bool(config.stream.path), allowed
    allowed = f"{_ALLOWED_SOURCES}: replay.share is {replay.share}"
    yield "replay.sources", bool(replay.sources), allowed
    rows = max(training.global_batch_size, training.local_batch_size * world_size)
    allowed = f"0, or a share that leaves whole sequences of both in a global batch of {rows}"
    yield "replay.share", 0 < replay.num_rows(rows) < rows, allowed


def _are_usable(sources: Sequence[Source]) -> bool:
    return all(source.path and 0 < source.weight < math.inf for source in sources)


def _rank_conditions(config: JobConfig, world_size: int) -> Iterator[Condition]:
    replicas = config.parallelism.data_parallel_replicate_degree
    shards = config.parallelism.data_parallel_shard_degree
    replicate_key = "parallelism.data_parallel_replicate_degree"
    ranks = f"the number of ranks, {world_size}"
    yield replicate_key, world_size % replicas == 0, f"a divisor of {ranks}"
    allowed = (
        f"-1 or {world_size // replicas}: times data_parallel_replicate_degree ({replicas}) "
        f"it gives {ranks}"
    )
    fits = shards == -1 or replicas * shards == world_size
    yield "parallelism.data_parallel_shard_degree", fits, allowed
    allowed = f"1 (FSDP), or at most {world_size // 2}: each replica is split over 2 ranks or more"
    yield replicate_key, replicas == 1 or world_size // replicas > 1, allowed
    local, whole = config.training.local_batch_size, config.training.global_batch_size
    fits = whole == -1 or (whole >= 1 and whole % (local * world_size) == 0)
    allowed = f"-1, or a multiple of training.local_batch_size ({local}) times {ranks}"
    yield "training.global_batch_size", fits, allowed
