"""A pass over background data that counts in how many batches each memory slot is used.

A document is one global batch of `idf.batch_size` sequences of `idf.seq_len` tokens, so the counts
do not depend on the number of ranks. The forward pass ends at the lookup of the last memory layer;
no value is read there. The pass writes a partial file now and then, and resumes from it.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from titan_smf import storage
from titan_smf.config.job import JobConfig
from titan_smf.data.loader import Batch
from titan_smf.errors import ConfigError
from titan_smf.progress import ProgressTimer, format_duration
from titan_smf.runtime import is_first_rank, on_any_rank
from titan_smf.sparse.accesses import (
    OwnedSlots,
    slots_used_fraction,
    sum_over_replicas,
    touched_slots,
)
from titan_smf.sparse.document_frequency import DocumentFrequency
from titan_smf.sparse.idf_file import (
    PARTIAL_SUFFIX,
    IdfMetadata,
    check_same_count,
    load_idf,
    read_metadata,
    save_idf,
)
from titan_smf.sparse.idf_report import draw_histogram, summary
from titan_smf.training.background import idf_model
from titan_smf.training.trainer import Trainer

logger = logging.getLogger("titan_smf")


def counting_config(config: JobConfig, world_size: int) -> JobConfig:
    """Return the configuration whose training batches are the background documents.

    Raises:
        ConfigError: the ranks cannot share a document evenly.
    """
    idf, local = config.idf, config.training.local_batch_size
    if idf.batch_size % (local * world_size):
        allowed = f"a multiple of training.local_batch_size ({local}) times the ranks, {world_size}"
        origin = config.origin("idf.batch_size")
        raise ConfigError("idf.batch_size", idf.batch_size, allowed, origin)
    if config.memory.layers == []:
        allowed = "at least one layer: a dense model has no slots"
        raise ConfigError("memory.layers", [], allowed, config.origin("memory.layers"))
    default = JobConfig()
    return config.changed(
        {
            "training.seq_len": idf.seq_len,
            "training.global_batch_size": idf.batch_size,
            "training.steps": idf.num_batches,
            "finetune.method": "full",
            "lora": default.lora,
            "replay": default.replay,
            "optimizer": default.optimizer,
            "stream.path": "",
            "checkpoint.enable": False,
            "validation.enable": False,
            "evaluation.sets": [],
            "metrics.enable_tensorboard": False,
        }
    )


def count_background(trainer: Trainer) -> bool:
    """Count with the weights that the trainer's configuration names; False if asked to stop."""
    trainer.restore()
    return BackgroundCount(trainer).run()


class BackgroundCount:
    """One pass over the background on all ranks."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.job_config
        self.trainer = trainer
        self.settings = config.idf
        self.folder = Path(config.job.dump_folder)
        self.path = config.idf.path or str(self.folder / "idf.safetensors")
        self.partial = self.path + PARTIAL_SUFFIX
        self.owned = OwnedSlots.of(trainer.model.value_tables())
        self.table = next(trainer.model.value_tables())
        self.frequency = DocumentFrequency(self.owned, trainer.device)
        seed = config.debug.seed or 0
        sources = ", ".join(f"{source.path} x {source.weight}" for source in config.data.sources)
        first = self.settings.first_batch
        self.metadata = IdfMetadata(
            model=idf_model(trainer.model, trainer.tokenizer),
            data=f"{sources}, seed {seed}",
            batch_size=self.settings.batch_size,
            seq_len=self.settings.seq_len,
            ranges=[[first, first]],
            complete=False,
        )

    def run(self) -> bool:
        """Count all documents; False if a stop request ended the pass before."""
        self._resume()
        trainer, total = self.trainer, self.settings.num_batches
        first = self.frequency.documents
        batches = iter(trainer.dataloader)
        timer = ProgressTimer()
        with trainer.stop:
            while self.frequency.documents < total:
                self._count_document(batches)
                done = self.frequency.documents
                if on_any_rank(trainer.stop.requested, trainer.device):
                    self._save(complete=False)
                    logger.info("Stopped on request after batch %d of %d", done, total)
                    return False
                if done % self.settings.checkpoint_interval == 0 and done < total:
                    self._save(complete=False)
                due = on_any_rank(timer.due(), trainer.device)
                if due or done in (first + 1, total):
                    timer.restart_line()
                    self._log_progress(done, total, (done - first) / timer.elapsed())
            self._save(complete=True)
        return True

    def _resume(self) -> None:
        """Go on from the partial file, if there is one."""
        first = self.settings.first_batch
        if on_any_rank(storage.exists(self.partial), self.trainer.device):
            metadata = read_metadata(self.partial)
            check_same_count(self.partial, metadata, self.metadata)
            if metadata.ranges != [[first, first + metadata.documents]]:
                allowed = (
                    f"that of {self.partial}, which counts {metadata.ranges}, or another idf.path"
                )
                raise ConfigError("idf.first_batch", first, allowed)
            if metadata.documents > self.settings.num_batches:
                allowed = (
                    f"{metadata.documents} or more, which {self.partial} counts already; or remove "
                    "it, or give another idf.path"
                )
                raise ConfigError("idf.num_batches", self.settings.num_batches, allowed)
            self.frequency.resume(load_idf(self.partial, self.owned, self.trainer.device))
            logger.info("Resumed after batch %d from %s", metadata.documents, self.partial)
        self.trainer.dataloader.skip((first + self.frequency.documents) * self.settings.batch_size)

    def _count_document(self, batches: Iterator[Batch]) -> None:
        accesses = []
        for _ in range(self.trainer.gradient_accumulation_steps):
            accesses += self.owned.ids_by_layer(self.trainer.accessed_rows(*next(batches)))
        touched = sum_over_replicas(touched_slots(accesses), self.table.replicate_group)
        self.frequency.add_document(touched)

    def _log_progress(self, done: int, total: int, speed: float) -> None:
        used = slots_used_fraction(self.frequency.df, self.table.group)
        left = format_duration((total - done) / speed)
        form = "batch %d/%d  %.2f batches/s  slots used %.1f%%  left %s"
        logger.info(form, done, total, speed, 100 * used, left)

    def _save(self, complete: bool) -> None:
        """Write the counts so far; the complete file replaces the partial one."""
        whole = self.frequency.gather(self.table.group)
        if is_first_rank():
            assert whole is not None
            first, documents = self.settings.first_batch, self.frequency.documents
            metadata = dataclasses.replace(
                self.metadata, ranges=[[first, first + documents]], complete=complete
            )
            save_idf(self.path if complete else self.partial, *whole, metadata)
            if complete:
                storage.remove(self.partial)
                picture = self.folder / "document_frequency.png"
                draw_histogram(whole[0], documents, str(picture))
                print(summary(*whole, documents))
                logger.info("Wrote %s and %s", self.path, picture)
        dist.barrier()
