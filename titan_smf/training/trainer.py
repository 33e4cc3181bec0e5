"""torchtitan's Trainer with memory layers: our steps, data, metrics, validation, checkpoints.

    1. restore: the newest checkpoint of this run, given weights, or random ones
    2. evaluate, if that was not done before the first step
    3. until the last step:
       a. learn one global batch: of all weights (`full_step.py`) or of selected rows of the value
          tables (`sparse_step.py`); then the next rate of the schedule
       b. if they are due: validate and evaluate, record metrics, save a checkpoint
       c. end if a rank was asked to stop
    4. write what others can use: the patch of a sparse run, the adapters of LoRA

torchtitan builds the model, the meshes, the optimizers and the schedule from the parts that
`train_spec.py` names. All ranks take the same way: what one of them was asked, they agree on.
"""

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from titan_smf.checkpoint.checkpointer import Checkpointer, find_checkpoint
from titan_smf.checkpoint.peft_format import save_adapters
from titan_smf.checkpoint.run_folder import lock_run_folder, make_run_folder
from titan_smf.config.job import JobConfig, add_origin, save_resolved
from titan_smf.data.loader import Batch, NoData, TokenLoader, validation_batches
from titan_smf.data.sources import open_source
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError
from titan_smf.evaluation.evaluated_model import EvaluatedModel
from titan_smf.evaluation.evaluator import Evaluator
from titan_smf.model.args import MemoryLlamaArgs
from titan_smf.model.llama import MemoryLlama, SlotLookup
from titan_smf.model.lora import LoraLlama
from titan_smf.runtime import EXIT_STOPPED, StopRequest, is_first_rank
from titan_smf.torchtitan_api import (
    IGNORE_INDEX,
    dist_utils,
    maybe_enable_memory_snapshot,
    maybe_enable_profiling,
    torchtitan_train,
)
from titan_smf.training.full_step import FullStep, MicroBatch
from titan_smf.training.loss import mean_loss
from titan_smf.training.metrics import RunMetrics, log_sizes
from titan_smf.training.optimizers import RowOptimizers
from titan_smf.training.resume import resume, run_identity
from titan_smf.training.run_patch import RunPatch, apply_patches
from titan_smf.training.sparse_step import SparseStep
from titan_smf.training.train_spec import registered_config

logger = logging.getLogger("titan_smf")


class Trainer(torchtitan_train.Trainer):
    """One training run on all ranks, from the first batch or a checkpoint to the last step."""

    job_config: JobConfig
    metrics_processor: RunMetrics
    model_args: MemoryLlamaArgs
    tokenizer: Tokenizer  # type: ignore[assignment]
    dataloader: TokenLoader  # type: ignore[assignment]

    def __init__(self, job_config: JobConfig) -> None:
        registered = registered_config(job_config)
        self.folder = Path(job_config.job.dump_folder)
        make_run_folder(self.folder)
        super().__init__(registered)
        self.job_config = job_config
        self.lock = lock_run_folder(self.folder)
        (model,) = self.model_parts
        assert isinstance(model, MemoryLlama)
        self.model = model
        if job_config.training.mixed_precision_param != "bfloat16":  # FSDP casts the weights
            self.maybe_enable_amp = torch.autocast(self.device.type, enabled=False)
        self.stop = StopRequest()
        self.sparse_step: SparseStep | None = None
        self.patch: RunPatch | None = None
        states: dict[str, Stateful] = {"trainer": self, "data": self.dataloader}
        row_files: RowOptimizers | None = None
        if isinstance(self.optimizers, RowOptimizers):
            row_files, rows = self.optimizers, self.optimizers.optimizers
            autocast = self.maybe_enable_amp
            self.sparse_step = SparseStep(model, rows, job_config, self.loss_fn, autocast)
            self.patch = RunPatch(model, rows, self.folder)
            states |= {"patch": self.patch, "selection": self.sparse_step}
        else:
            max_norm = job_config.training.max_norm
            self.full_step = FullStep(model, self.optimizers, max_norm, self.loss_and_accesses)
        self.checkpoints = Checkpointer(
            self.folder / job_config.checkpoint.folder,
            model,
            self.optimizers,
            states,
            identity=run_identity(job_config, self.model_args, self.tokenizer),
            keep=job_config.checkpoint.keep_latest_k,
            rank_files=row_files,
        )
        if job_config.validation.enable:
            source, cache = job_config.data.validation, job_config.data.cache
            self.validation_shards = open_source(source, self.tokenizer, cache)
        evaluated = EvaluatedModel(
            model,
            self.tokenizer,
            self.device,
            self.maybe_enable_amp,
            job_config.parallelism.fsdp_reshard_after_forward,
            self.stop,
        )
        self.evaluation = Evaluator(job_config, evaluated)
        trains = not isinstance(self.dataloader, NoData)
        log_sizes(job_config, model, self.gradient_accumulation_steps if trains else 0)

    def train(self) -> bool:
        """Run to the last step; False if a stop request ended the run before it."""
        self.restore()
        self._open_outputs()
        with self.stop:
            done = self._evaluate_first() and self._loop()
            # Also if a kill came between the last checkpoint and these files.
            if self.patch is not None:
                self.patch.save(self.step)
            if isinstance(self.model, LoraLlama):
                config = self.job_config
                start = config.checkpoint.initial_load_path
                save_adapters(self.model, config.lora, start, self.folder)
        return done

    def restore(self) -> None:
        """Go on from this run's newest checkpoint, start from given weights, or start anew."""
        if resume(self.job_config, self.folder, self.checkpoints):
            return
        if path := self.job_config.checkpoint.initial_load_path:
            self.load_weights(path)
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

    def _open_outputs(self) -> None:
        """Open the run's files after `self.step`; what they hold of later steps is dropped."""
        if self.sparse_step is not None:
            self.sparse_step.start(self.step, self.tokenizer)
        self.metrics_processor.start(self.job_config, self.step)
        if is_first_rank():
            save_resolved(self.job_config, self.folder / "config.toml")
        self.evaluation.start(self.step)

    def _evaluate_first(self) -> bool:
        """Do the evaluations that are due where the run begins; False if asked to stop."""
        values, stopped = self.evaluation.run(self.step)
        if values:
            self.metrics_processor.record(self.step, values)
        if stopped:
            logger.info("Stopped on request in the evaluation after step %d", self.step)
        return not stopped

    def _loop(self) -> bool:
        """Make the remaining steps; False if a stop request ended the loop before the last."""
        config, first = self.job_config, self.step + 1
        if self.step >= config.training.steps:
            logger.info("Nothing to do: step %d of %d", self.step, config.training.steps)
            return True
        batches = self.batch_generator(self.dataloader)
        where: dict[str, Any] = {"global_step": self.step, "base_folder": str(self.folder)}
        with (
            maybe_enable_profiling(config.profiling, **where) as profiler,
            maybe_enable_memory_snapshot(config.profiling, **where) as snapshots,
        ):
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
                for watching in (profiler, snapshots):
                    if watching:
                        watching.step()
                if self.step == first:
                    # Start-up and compilation are over: a rank that is lost is noticed sooner.
                    timeout = timedelta(seconds=config.comm.train_timeout_seconds)
                    dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
        return True

    def train_step(self, data_iterator: Iterator[Batch]) -> tuple[dict[str, float], bool]:
        """Make one optimizer step on one global batch.

        Returns:
            the step's metrics (empty between logged steps), and whether any rank was asked to stop.
        """
        self.optimizers.zero_grad()
        last = self.step == self.job_config.training.steps
        logged = last or self.metrics_processor.should_log(self.step)
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        targets = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)
        sums = torch.tensor([targets, int(self.stop.requested)], device=self.device)
        dist.all_reduce(sums)
        global_targets, stop = sums.tolist()
        on_device = [self.on_device(*batch) for batch in batches]
        if self.sparse_step is not None:
            loss, grad_norm, metrics = self.sparse_step.step(on_device, global_targets, self.step)
        else:
            loss, grad_norm, metrics = self.full_step.step(on_device, global_targets, logged)
        self.lr_schedulers.step()
        if not logged:
            return {}, bool(stop)
        dist.all_reduce(loss)
        values = {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": float(lr)}
        return values | metrics, bool(stop)

    def validate(self) -> float | None:
        """Return the mean loss a token on a fixed part of `data.validation`; None if stopped."""
        training, settings = self.job_config.training, self.job_config.validation
        rank, ranks = dist.get_rank(), dist.get_world_size()
        global_batch = self.gradient_accumulation_steps * training.local_batch_size * ranks
        batches = validation_batches(
            self.validation_shards,
            settings.seq_len,
            settings.local_batch_size,
            rank,
            ranks,
            num_samples=max(settings.steps, 0) * global_batch,
        )

        def loss_of(batch: Batch) -> torch.Tensor:
            return self.loss_and_accesses(self.on_device(*batch))[0]

        return mean_loss(self.model, batches, loss_of, self.stop, self.device)

    def on_device(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> MicroBatch:
        """Move a batch of the loader to the device, with its masks."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        tokens, labels, more, masks = self.post_dataloading_process(inputs, labels.to(self.device))
        # Without replay all that is not padding, where no token is to be predicted.
        return MicroBatch(tokens, labels, more.get("new", labels != IGNORE_INDEX), masks)

    def loss_and_accesses(self, batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the loss summed over this micro-batch's target tokens, and the accesses here."""
        with self.train_context(), self.maybe_enable_amp:
            logits, accesses = self.model(batch.tokens, **batch.masks)
            return self.loss_fn(logits, batch.labels), accesses

    @torch.no_grad()
    def accessed_rows(
        self,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        observe: Callable[[SlotLookup], None] | None = None,
    ) -> list[torch.Tensor]:
        """Return the rows of this rank that the ranks' micro-batches access, for each memory layer.

        `observe` is called with this rank's own lookups, of padding too.
        """
        batch = self.on_device(inputs, labels)
        with self.maybe_enable_amp:
            return self.model(batch.tokens, **batch.masks, part="to_memory", observe=observe)[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the run; torchtitan's token count is left to the data position."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the position of the run, and with it the schedule's, for the rates of this run."""
        self.step = state_dict["step"]
        for schedule in self.lr_schedulers.schedulers:
            schedule.last_epoch = self.step - 1
            schedule.step()

    def close(self) -> None:
        """Close the run's files, and let other runs write into its folder."""
        super().close()
        self.lock.release()


def run(
    config: JobConfig,
    work: Callable[[Trainer], bool],
    build: Callable[[JobConfig], Trainer] = Trainer,
) -> int:
    """Build a trainer, do `work` with it and close it; return the exit code.

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
