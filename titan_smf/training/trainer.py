"""torchtitan's Trainer with memory layers: our step, data, metrics, validation and checkpoints.

    batch -> forward, backward (per micro-batch) -> table gradients over replicas
          -> clip by the global norm -> optimizer -> schedule -> metrics -> checkpoint

torchtitan builds the model, the meshes, the optimizers and the schedule; the loop here is its loop
with four additions: table gradients are reduced over replicas, accesses are counted, a stop request
is agreed on by all ranks, and checkpoints are committed (`checkpoint.py`).
"""

import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule

from titan_smf.checkpoint.checkpointer import Checkpointer, find_checkpoint
from titan_smf.checkpoint.peft_format import save_adapters
from titan_smf.checkpoint.run_folder import check_not_overwritten, lock_run_folder, make_run_folder
from titan_smf.config.job import JobConfig, add_origin, save_resolved
from titan_smf.data.loader import Batch, NoData, TokenLoader, validation_batches
from titan_smf.data.sources import open_source
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import CheckpointError, ConfigError
from titan_smf.evaluation.evaluated_model import EvaluatedModel
from titan_smf.evaluation.evaluator import Evaluator
from titan_smf.model.llama import (
    Addressed,
    MemoryLlama,
    MemoryLlamaArgs,
    num_trainable,
)
from titan_smf.model.lora import LoraLlama
from titan_smf.model.value_table import ValueTable
from titan_smf.runtime import EXIT_STOPPED, StopRequest
from titan_smf.sparse.accesses import AccessCounter, slots_used_fraction, usage_kl
from titan_smf.storage import drop_lines_after
from titan_smf.streams.loader import open_stream
from titan_smf.streams.records import Record
from titan_smf.torchtitan_api import (
    IGNORE_INDEX,
    dist_utils,
    maybe_enable_profiling,
    register_train_spec,
    torchtitan_train,
)
from titan_smf.training.background import load_background
from titan_smf.training.metrics import RunMetrics
from titan_smf.training.run_patch import RunPatch, apply_patches
from titan_smf.training.run_sizes import log_batch, log_model
from titan_smf.training.sparse_memory import SELECTIONS_FILE, MicroBatch, SparseMemory
from titan_smf.training.train_spec import build_train_spec

logger = logging.getLogger("titan_smf")

_BATCHES_BETWEEN_STOP_CHECKS = 16


class Trainer(torchtitan_train.Trainer):
    """One training run on all ranks, from the first batch or a checkpoint to the last step."""

    job_config: JobConfig
    metrics_processor: RunMetrics
    model_args: MemoryLlamaArgs
    tokenizer: Tokenizer  # type: ignore[assignment]
    dataloader: TokenLoader  # type: ignore[assignment]

    def __init__(self, job_config: JobConfig) -> None:
        stream: Sequence[Record] = ()
        if path := job_config.stream.path:
            stream = open_stream(path, job_config.stream.kind)
            visits = job_config.stream.epochs * job_config.stream.steps_per_record
            steps = len(stream) * visits  # the run ends with its stream
            job_config.training.steps = min(job_config.training.steps, steps)
        # torchtitan looks the parts up by the model's name; each run registers its own.
        name = f"{job_config.model.name}-{uuid.uuid4()}"
        register_train_spec(name, build_train_spec(job_config, stream))
        self.folder = Path(job_config.job.dump_folder)
        make_run_folder(self.folder)
        # torchtitan's own checkpoints, TensorBoard and validation are replaced by ours, and a
        # record of NCCL's calls is of no use on a CPU.
        comm = job_config.comm
        if not torch.accelerator.is_available():
            comm = dataclasses.replace(comm, trace_buf_size=0)
        super().__init__(
            dataclasses.replace(
                job_config,
                model=dataclasses.replace(job_config.model, name=name),
                comm=comm,
                checkpoint=dataclasses.replace(job_config.checkpoint, enable=False),
                metrics=dataclasses.replace(job_config.metrics, enable_tensorboard=False),
                validation=dataclasses.replace(job_config.validation, enable=False),
            )
        )
        self.job_config = job_config
        self.lock = lock_run_folder(self.folder)
        model = self.model_parts[0]
        assert isinstance(model, MemoryLlama)
        self.model = model
        if job_config.training.mixed_precision_param != "bfloat16":
            self.maybe_enable_amp = torch.autocast(self.device.type, enabled=False)
        sparse = job_config.finetune.method == "sparse_memory"  # which counts what it selects from
        self.accesses = [
            AccessCounter(_num_local_rows(table), self.device)
            for table in model.value_tables()
            if not sparse
        ]
        replicas = self.parallel_dims.get_optional_mesh("dp_replicate")
        self.replicate_group = replicas.get_group() if replicas is not None else None
        self.sparse_memory = self._build_sparse_memory()
        states: dict[str, Stateful] = {"trainer": self, "data": self.dataloader}
        self.patch: RunPatch | None = None
        if self.sparse_memory is not None:
            optimizers = self.sparse_memory.optimizers
            self.patch = RunPatch(model, optimizers, self.folder, self.replicate_group)
            states |= {"patch": self.patch, "selection": self.sparse_memory}
        self.checkpoints = Checkpointer(
            self.folder / job_config.checkpoint.folder,
            model,
            self.optimizers,
            states,
            identity=self._identity(),
            keep=job_config.checkpoint.keep_latest_k,
            rank_files=self.sparse_memory,
        )
        self.validation_shards = (
            open_source(job_config.data.validation, self.tokenizer, job_config.data.cache)
            if job_config.validation.enable
            else None
        )
        self.stop: StopRequest | None = None
        evaluated = EvaluatedModel(
            model,
            self.tokenizer,
            self.device,
            lambda: self.maybe_enable_amp,
            job_config.parallelism.fsdp_reshard_after_forward,
            self.stop_requested,
        )
        self.evaluation = Evaluator(job_config, evaluated)
        flops = self.metrics_processor.num_flops_per_token
        log_model(job_config, model, self.device.type, flops)
        if not isinstance(self.dataloader, NoData):
            log_batch(job_config, self.gradient_accumulation_steps)

    def _build_sparse_memory(self) -> SparseMemory | None:
        config = self.job_config
        if config.finetune.method != "sparse_memory":
            return None
        return SparseMemory(
            self.model,
            self.optimizers.optimizers,
            config,
            self.replicate_group,
            self.loss_fn,
            lambda: self.maybe_enable_amp,
            self.folder,
        )

    def _start_sparse_memory(self, sparse_memory: SparseMemory) -> None:
        """What can be done only once the weights and the position are known."""
        settings = self.job_config.selection
        if self.job_config.needs_counts:
            sparse_memory.background = load_background(
                settings.idf_path, self.model, self.tokenizer, self.device
            )
        if settings.log and dist.get_rank() == 0:
            drop_lines_after(self.folder / SELECTIONS_FILE, self.step)

    def train(self) -> bool:
        """Run to the last step; False if a stop request ended the run before it."""
        config = self.job_config
        self.restore()
        if self.sparse_memory is not None:
            self._start_sparse_memory(self.sparse_memory)
        tensorboard = self.folder / config.metrics.save_tb_folder
        self.metrics_processor.start(
            self.folder,
            self.step,
            config.training.steps,
            tensorboard if config.metrics.enable_tensorboard else None,
        )
        if dist.get_rank() == 0:
            save_resolved(config, self.folder / "config.toml")
        self.evaluation.start(self.step)
        self.stop = StopRequest()
        try:
            values, stopped = self.evaluation.run(self.step)
            if values:
                self.metrics_processor.record(self.step, values)
            if stopped:
                logger.info("Stopped on request in the evaluation after step %d", self.step)
                done = False
            elif self.step >= config.training.steps:
                logger.info("Nothing to do: step %d of %d", self.step, config.training.steps)
                done = True
            else:
                with maybe_enable_profiling(
                    config.profiling, global_step=self.step, base_folder=str(self.folder)
                ) as profiler:
                    done = self._loop(profiler)
            # Also if a kill came between the last checkpoint and these files.
            if self.patch is not None:
                self.patch.save(self.step)
            if isinstance(self.model, LoraLlama):
                save_adapters(
                    self.model, config.lora, config.checkpoint.initial_load_path, self.folder
                )
            return done
        finally:
            self.stop.restore()
            self.stop = None

    def _loop(self, profiler: Any) -> bool:
        config = self.job_config
        batches = self.batch_generator(self.dataloader)
        first = self.step + 1
        while self.step < config.training.steps:
            self.step += 1
            self.gc_handler.run(self.step)
            with self.metrics_processor.timed_step():
                values, stop = self.train_step(batches)
            if values:
                values |= self.metrics_processor.speed()
            last = self.step == config.training.steps
            if config.validation.enable and (last or self.step % config.validation.freq == 0):
                loss = self.validate()
                stop = stop or loss is None
                values |= {} if loss is None else {"evaluation/validation/loss": loss}
            means, unfinished = self.evaluation.run(self.step)
            values |= means
            stop = stop or unfinished
            if values:
                self.metrics_processor.record(self.step, values)
            due = last or stop or self.step % config.checkpoint.interval == 0
            if due and config.checkpoint.enable and not config.checkpoint.load_only:
                self.checkpoints.save(self.step)
            if stop and (unfinished or not last):
                logger.info("Stopped on request after step %d", self.step)
                return False
            if profiler:
                profiler.step()
            if self.step == first:
                # Start-up and compilation are over: a rank that is lost is noticed sooner.
                dist_utils.set_pg_timeouts(
                    timedelta(seconds=config.comm.train_timeout_seconds), self.parallel_dims
                )
        return True

    def train_step(self, data_iterator: Iterator[Batch]) -> tuple[dict[str, float], bool]:
        """One optimizer step on one global batch.

        Returns:
            the step's metrics (empty between logged steps), and whether any rank was asked to stop.
        """
        self.optimizers.zero_grad()
        last = self.step == self.job_config.training.steps
        logged = last or self.metrics_processor.should_log(self.step)
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        targets = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)
        sums = torch.tensor([targets, int(self.stop_requested())], device=self.device)
        dist.all_reduce(sums)
        global_targets, stop = sums.tolist()
        on_device = [self._on_device(inputs, labels) for inputs, labels in batches]
        if self.sparse_memory is None:
            loss, grad_norm, metrics = self._update_all(on_device, global_targets, logged)
        else:
            loss, grad_norm, metrics = self.sparse_memory.step(on_device, global_targets, self.step)
        self.lr_schedulers.step()
        if not logged:
            return {}, bool(stop)
        dist.all_reduce(loss)
        values = {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": float(lr)}
        return values | metrics, bool(stop)

    def _update_all(
        self, batches: Sequence[MicroBatch], global_targets: int, logged: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Update all weights: this rank's part of the loss, the gradient's norm, and metrics."""
        losses = []
        for batch in batches:
            loss, accesses = self._forward(batch)
            loss = loss / global_targets
            loss.backward()
            losses.append(loss.detach())
            if logged:
                self._count(accesses)
        for table in self.model.value_tables():
            table.reduce_replica_gradients()
        grad_norm = dist_utils.clip_grad_norm_(
            self.model.parameters(), self.job_config.training.max_norm, foreach=True
        )
        self.optimizers.step()
        metrics = {"numbers_updated": float(num_trainable(self.model))}
        return torch.stack(losses).sum(), grad_norm, metrics | self._usage() if logged else {}

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss a token over a fixed part of the validation data; None if asked to stop."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for number, (inputs, labels) in enumerate(self._validation_batches(), start=1):
            loss, _ = self._forward(self._on_device(inputs, labels))
            sums[:2] += torch.stack([loss, (labels != IGNORE_INDEX).sum().to(loss)]).double()
            if number % _BATCHES_BETWEEN_STOP_CHECKS == 0 and self.agree(self.stop_requested()):
                break
        sums[2] = self.stop_requested()
        dist.all_reduce(sums)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass the last parameters stay gathered
        self.model.train()
        total, targets, stops = sums.tolist()
        return None if stops else total / targets

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.stop is not None and self.stop.requested

    def agree(self, here: bool) -> bool:
        """Whether it is so on any rank. Collective."""
        anywhere = torch.tensor(int(here), device=self.device)
        dist.all_reduce(anywhere)
        return bool(anywhere.item())

    @torch.no_grad()
    def addresses(
        self,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        observe: Callable[[Addressed], None] | None = None,
    ) -> list[torch.Tensor]:
        """The rows of this rank that the ranks' micro-batches access, for each memory layer.

        `observe` is called with what this rank's own micro-batch accesses, padding included.
        """
        batch = self._on_device(inputs, labels)
        with self.maybe_enable_amp:
            return self.model(batch.tokens, **batch.masks, part="to_memory", observe=observe)[1]

    def _validation_batches(self) -> Iterator[Batch]:
        training, settings = self.job_config.training, self.job_config.validation
        global_batch = self.gradient_accumulation_steps * training.local_batch_size
        assert self.validation_shards is not None
        return validation_batches(
            self.validation_shards,
            settings.seq_len,
            settings.local_batch_size,
            dist.get_rank(),
            dist.get_world_size(),
            num_samples=max(settings.steps, 0) * global_batch * dist.get_world_size(),
        )

    def _on_device(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> MicroBatch:
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        tokens, labels, more, masks = self.post_dataloading_process(inputs, labels.to(self.device))
        # Without replay all that is not padding, where no token is to be predicted.
        return MicroBatch(tokens, labels, more.get("new", labels != IGNORE_INDEX), masks)

    def _forward(self, batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Sum of the loss over this micro-batch's target tokens, and the accesses here."""
        with self.train_context(), self.maybe_enable_amp:
            logits, accesses = self.model(batch.tokens, **batch.masks)
            return self.loss_fn(logits, batch.labels), accesses

    def _count(self, accesses: list[torch.Tensor]) -> None:
        memory = self.model.model_args.memory
        for index, rows in enumerate(accesses):
            self.accesses[0 if memory.share_values else index].add(rows)

    def _usage(self) -> dict[str, float]:
        """How the last global batch used the slots of all tables."""
        if not self.accesses:
            return {}
        counts = torch.cat([counter.counts for counter in self.accesses])
        groups = next(self.model.value_tables()).group, self.replicate_group
        for counter in self.accesses:
            counter.reset()
        return {
            "memory/slots_used_fraction": slots_used_fraction(counts, *groups),
            "memory/usage_kl": usage_kl(counts, *groups),
        }

    def restore(self) -> None:
        """Go on from this run's newest checkpoint, start from given weights, or start anew."""
        config = self.job_config.checkpoint
        saved = self.checkpoints.latest() if config.enable else None
        if config.load_step != -1:
            self._check_load_step(config.load_step, saved)
            saved = config.load_step
        if saved is not None:
            self.checkpoints.load(saved)
            logger.info("Resumed from step %d in %s", saved, self.checkpoints.folder)
            return
        check_not_overwritten(self.folder, self.checkpoints.folder, config.enable)
        if config.initial_load_path:
            self.load_weights(config.initial_load_path)
        else:
            logger.info("Random initial weights, seed %d", self.model_args.seed)
        if self.patch is not None:
            self.patch.begin()

    def load_weights(self, run: str) -> Path:
        """Take the weights of a run or checkpoint, changed by `checkpoint.initial_patches`.

        Returns:
            the checkpoint.
        """
        path = find_checkpoint(Path(run))
        self.checkpoints.load_weights(path)
        logger.info("Weights from %s", path)
        if patches := self.job_config.checkpoint.initial_patches:
            apply_patches(self.model, patches)
        return path

    def _check_load_step(self, step: int, latest: int | None) -> None:
        if not self.job_config.checkpoint.enable:
            raise ConfigError("checkpoint.load_step", step, "checkpoint.enable = true beside it")
        if latest is not None and latest > step:
            raise CheckpointError(
                f"checkpoint.load_step {step}: {self.checkpoints.folder} holds the later step "
                f"{latest}, which a restart would take; move later steps away, or start in "
                "a new job.dump_folder with checkpoint.initial_load_path"
            )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run to fit it."""
        settings = dataclasses.asdict(self.model_args)
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "rope_theta", "vocab_size")
        weights = {name: settings[name] for name in (*names, "memory")}
        tokenizer = {"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint}
        lora = self.job_config.finetune.method == "lora"
        return {
            "weights": {"model": weights, "tokenizer": tokenizer},
            "adapters": dataclasses.asdict(self.job_config.lora) if lora else None,
            "training": {
                "dtype": self.job_config.training.dtype,
                "method": self.job_config.finetune.method,
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The position of the run; torchtitan's token count is left to the data position."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the position of the run, and with it the schedule's, for the rates of this run."""
        self.step = state_dict["step"]
        for schedule in self.lr_schedulers.schedulers:
            schedule.last_epoch = self.step - 1
            schedule.step()

    def close(self) -> None:
        """End the run's hold of its folder, close its files."""
        super().close()
        self.lock.release()


def run(
    config: JobConfig,
    work: Callable[[Trainer], bool],
    build: Callable[[JobConfig], Trainer] = Trainer,
) -> int:
    """Build a trainer, do `work` with it and close it; returns the exit code.

    `work` says whether it ended by itself, not by a stop request. A `ConfigError` learns where its
    setting was given.
    """
    try:
        trainer = build(config)
        try:
            done = work(trainer)
        finally:
            trainer.close()
    except ConfigError as error:
        add_origin(error, config)
        raise
    return 0 if done else EXIT_STOPPED


def _num_local_rows(table: ValueTable) -> int:
    start, stop = table.row_range
    return stop - start
