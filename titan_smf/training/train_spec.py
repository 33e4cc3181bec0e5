"""The parts that torchtitan's Trainer builds a run from, for one configuration."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from titan_smf.config.job import JobConfig
from titan_smf.config.sections import Source
from titan_smf.data.loader import NoData, TokenLoader, WeightedShards
from titan_smf.data.replay import Replay
from titan_smf.data.sources import open_source
from titan_smf.data.tokenizer import Tokenizer, load_tokenizer
from titan_smf.errors import ConfigError
from titan_smf.model.llama import FLAVORS, MemoryLlama, MemoryLlamaArgs
from titan_smf.model.lora import LoraLlama, target_names
from titan_smf.model.parallelize import parallelize
from titan_smf.sparse.row_optimizer import RowOptimizer
from titan_smf.streams.loader import StreamLoader
from titan_smf.streams.records import Record
from titan_smf.torchtitan_api import (
    IGNORE_INDEX,
    OptimizersContainer,
    ParallelDims,
    TrainSpec,
    build_lr_schedulers,
)
from titan_smf.training.metrics import RunMetrics
from titan_smf.training.sparse_memory import freeze, row_optimizers

_VOCABULARY_MULTIPLE = 64  # matrix products are faster on round sizes; the extra ids never occur


def build_train_spec(config: JobConfig, stream: Sequence[Record] = ()) -> TrainSpec:
    """Everything torchtitan asks for, bound to `config`.

    Args:
        stream: the records of `stream.path`; with none, `data.sources` are trained on.

    Raises:
        ConfigError, DataError: the tokenizer, the data or the model cannot be built as asked.
    """
    settings = config.tokenizer
    tokenizer = load_tokenizer(settings.name, settings.path, settings.pattern)
    args = model_args(config, tokenizer)

    method = config.finetune.method

    def build_dataloader(
        dp_world_size: int, dp_rank: int, **_: Any
    ) -> TokenLoader | StreamLoader | NoData:
        if not stream and not config.data.sources:
            return NoData()
        if stream:
            return _stream_loader(config, stream, tokenizer, dp_rank, dp_world_size)
        return _token_loader(config, config.data.sources, tokenizer, dp_rank, dp_world_size)

    def parallelized(model: MemoryLlama, dims: ParallelDims, job_config: JobConfig) -> MemoryLlama:
        if method in ("sparse_memory", "values"):
            freeze(model)  # before FSDP, which then reduces no gradients
        if method == "values":
            model.tables.requires_grad_(True)
        return parallelize(model, dims, job_config)

    def build_optimizers(models: list[MemoryLlama], *_: Any) -> OptimizersContainer:
        return (RowOptimizers if method == "sparse_memory" else AdamWithValues)(models[0], config)

    model_cls = partial(LoraLlama, lora=config.lora) if method == "lora" else MemoryLlama
    return TrainSpec(
        model_cls=model_cls,  # type: ignore[arg-type]
        model_args={config.model.flavor: args},
        parallelize_fn=parallelized,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,  # type: ignore[arg-type]
        build_tokenizer_fn=lambda *_: tokenizer,  # type: ignore[arg-type]
        build_loss_fn=_build_loss,
        build_metrics_processor_fn=lambda config, dims, *_: RunMetrics(config, dims),
    )


def _token_loader(
    config: JobConfig, sources: Sequence[Source], tokenizer: Tokenizer, rank: int, ranks: int
) -> TokenLoader:
    cache = config.data.cache
    shards = [
        WeightedShards(source.path, open_source(source.path, tokenizer, cache), source.weight)
        for source in sources
    ]
    return TokenLoader(
        shards,
        seq_len=config.training.seq_len,
        local_batch_size=config.training.local_batch_size,
        dp_rank=rank,
        dp_world_size=ranks,
        seed=config.debug.seed or 0,
    )


def _stream_loader(
    config: JobConfig, stream: Sequence[Record], tokenizer: Tokenizer, rank: int, ranks: int
) -> StreamLoader:
    local = config.training.local_batch_size
    global_size = max(config.training.global_batch_size, local * ranks)
    replay = None
    if replay_rows := config.replay.num_rows(global_size):
        background = _token_loader(config, config.replay.sources, tokenizer, rank, ranks)
        replay = Replay(background, replay_rows, global_size)
    return StreamLoader(
        stream,
        tokenizer,
        seq_len=config.training.seq_len,
        local_batch_size=local,
        global_batch_size=global_size,
        dp_rank=rank,
        dp_world_size=ranks,
        epochs=config.stream.epochs,
        steps_per_record=config.stream.steps_per_record,
        replay=replay,
    )


def model_args(config: JobConfig, tokenizer: Tokenizer) -> MemoryLlamaArgs:
    """The flavor's sizes with the settings of `config` over them and the tokenizer's vocabulary."""
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


class AdamWithValues(OptimizersContainer):
    """Adam or AdamW in two groups: the value tables with a rate of their own, and the rest."""

    def __init__(self, model: MemoryLlama, config: JobConfig) -> None:
        settings = config.optimizer
        shared = {
            "lr": settings.lr,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "fused": settings.implementation == "fused",
            "foreach": settings.implementation == "foreach",
        }
        values = [p for p in model.tables.parameters() if p.requires_grad]
        rest = [
            p for p in model.parameters() if p.requires_grad and all(p is not v for v in values)
        ]
        groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
        if values:
            memory = config.memory
            decay = memory.value_weight_decay
            groups.append({"params": values, "lr": memory.value_lr, "weight_decay": decay})
        self.model_parts = [model]
        self.optimizers = [getattr(torch.optim, settings.name)(groups, **shared)]
        self._post_init(rest + values, shared)


class RowOptimizers(OptimizersContainer):
    """The row optimizers of all tables. Their state goes by row, not by parameter."""

    optimizers: list[RowOptimizer]

    def __init__(self, model: MemoryLlama, config: JobConfig) -> None:
        self.model_parts = [model]
        self.optimizers = row_optimizers(model, config)
        self._post_init([table.values for table in model.value_tables()], {})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint holds the rows' state in files of its own."""
        return {}

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: each step makes its gradients anew."""


def _build_loss(job_config: JobConfig, **_: Any) -> Any:
    if job_config.compile.enable and "loss" in job_config.compile.components:
        return torch.compile(summed_cross_entropy, backend=job_config.compile.backend)
    return summed_cross_entropy


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over target tokens, in float32 or the wider type of `logits`.

    Args:
        logits: (B, S, vocabulary).
        labels: (B, S) token ids; IGNORE_INDEX where there is no target.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, 1).to(wide),
        labels.flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
    )
