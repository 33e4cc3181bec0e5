"""The parts that torchtitan's Trainer builds a run from, for one configuration."""

import copy
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from titan_smf.config.job import JobConfig
from titan_smf.config.sections import Source
from titan_smf.data.loader import NoData, TokenLoader, WeightedShards
from titan_smf.data.replay import Replay
from titan_smf.data.sources import open_source
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer
from titan_smf.errors import ConfigError
from titan_smf.model.args import FLAVORS, MemoryLlamaArgs
from titan_smf.model.llama import MemoryLlama
from titan_smf.model.lora import LoraLlama, target_names
from titan_smf.model.parallelize import parallelize
from titan_smf.streams.loader import StreamLoader
from titan_smf.streams.records import Record, open_stream
from titan_smf.torchtitan_api import (
    OptimizersContainer,
    TrainSpec,
    build_lr_schedulers,
    register_train_spec,
)
from titan_smf.training.loss import build_loss
from titan_smf.training.metrics import RunMetrics
from titan_smf.training.optimizers import AdamWithValues, RowOptimizers

_VOCABULARY_MULTIPLE = 64  # matrix products are faster on round sizes; the extra ids never occur


def registered_config(config: JobConfig) -> JobConfig:
    """Register the parts of a run; return its configuration as torchtitan's Trainer takes it.

    A run ends with its stream: `training.steps` of `config` shrinks to that.

    Raises:
        ConfigError, DataError: the tokenizer, the data or the model cannot be built as asked.
    """
    stream: Sequence[Record] = ()
    if path := config.stream.path:
        stream = open_stream(path, config.stream.kind)
        steps = len(stream) * config.stream.epochs * config.stream.steps_per_record
        config.training.steps = min(config.training.steps, steps)
    # torchtitan looks the parts up by the model's name; each run registers its own.
    name = f"{config.model.name}-{uuid.uuid4()}"
    register_train_spec(name, build_train_spec(config, stream))
    # Ours replace torchtitan's own checkpoints, TensorBoard and validation.
    changed = {
        "model.name": name,
        "checkpoint.enable": False,
        "metrics.enable_tensorboard": False,
        "validation.enable": False,
    }
    if not torch.accelerator.is_available():
        changed["comm.trace_buf_size"] = 0  # a record of NCCL's calls is of no use on a CPU
    return config.changed(changed)


def build_train_spec(config: JobConfig, stream: Sequence[Record] = ()) -> TrainSpec:
    """Return the parts that torchtitan asks for, bound to `config`.

    Args:
        stream: the records of `stream.path`; with none, `data.sources` are trained on.

    Raises:
        ConfigError, DataError: the tokenizer, the data or the model cannot be built as asked.
    """
    settings, method = config.tokenizer, config.finetune.method
    tokenizer = load_tokenizer(settings.name, settings.path, settings.pattern)

    def build_model(args: MemoryLlamaArgs) -> MemoryLlama:
        if method == "lora":
            return LoraLlama(args, config.lora)
        model = MemoryLlama(args)
        if method != "full":  # before FSDP, which then reduces no gradients
            model.requires_grad_(False)
            model.tables.requires_grad_(method == "values")
        return model

    def build_optimizers(models: list[MemoryLlama], *_: Any) -> OptimizersContainer:
        return (RowOptimizers if method == "sparse_memory" else AdamWithValues)(models[0], config)

    return TrainSpec(
        model_cls=build_model,  # type: ignore[arg-type]
        model_args={config.model.flavor: model_args(config, tokenizer)},
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=partial(build_loader, stream),  # type: ignore[arg-type]
        build_tokenizer_fn=lambda *_: tokenizer,  # type: ignore[arg-type]
        build_loss_fn=build_loss,
        build_metrics_processor_fn=lambda config, dims, *_: RunMetrics(config, dims),
    )


def build_loader(
    stream: Sequence[Record],
    *,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: Tokenizer,
    job_config: JobConfig,
) -> TokenLoader | StreamLoader | NoData:
    """Return a rank's loader of the stream, with replay where it is asked for, or of the data."""
    training, replay = job_config.training, job_config.replay
    of_rank = {
        "seq_len": training.seq_len,
        "local_batch_size": training.local_batch_size,
        "dp_rank": dp_rank,
        "dp_world_size": dp_world_size,
    }

    def token_loader(sources: Sequence[Source]) -> TokenLoader:
        cache = job_config.data.cache
        shards = [
            WeightedShards(source.path, open_source(source.path, tokenizer, cache), source.weight)
            for source in sources
        ]
        return TokenLoader(shards, **of_rank, seed=job_config.debug.seed or 0)

    if not stream:
        sources = job_config.data.sources
        return token_loader(sources) if sources else NoData()
    global_size = max(training.global_batch_size, training.local_batch_size * dp_world_size)
    rows = replay.num_rows(global_size)
    return StreamLoader(
        stream,
        tokenizer,
        **of_rank,
        global_batch_size=global_size,
        epochs=job_config.stream.epochs,
        steps_per_record=job_config.stream.steps_per_record,
        replay=Replay(token_loader(replay.sources), rows, global_size) if rows else None,
    )


def model_args(config: JobConfig, tokenizer: Tokenizer) -> MemoryLlamaArgs:
    """Return the flavor's sizes, with `config`'s over them, and the tokenizer's vocabulary."""
    if config.model.flavor not in FLAVORS:
        raise ConfigError("model.flavor", config.model.flavor, ", ".join(FLAVORS))
    args = copy.deepcopy(FLAVORS[config.model.flavor])
    args.vocab_size = -(-tokenizer.n_vocab // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    args.eos_id = tokenizer.eos_id
    args.update_from_config(config)
    if config.finetune.method in ("sparse_memory", "values") and not args.memory.layers:
        allowed = "full or lora, for a model without memory"
        raise ConfigError("finetune.method", config.finetune.method, allowed)
    if config.finetune.method == "lora":
        target_names(args, config.lora)
    return args
