"""The pretrained models that methods begin with, their counts, and their weights in memory.

Each is kept in a folder named by a hash of the settings that its plan gives: the same settings find
it again, other settings make another one. A pretraining or a count that was stopped goes on.
"""

import hashlib
import itertools
import json
import logging
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from titan_smf import storage
from titan_smf.checkpoint.checkpointer import LAST
from titan_smf.config.job import JobConfig
from titan_smf.data.sources import source_texts
from titan_smf.data.tokenizer import train_rank_file
from titan_smf.model.names import is_adapter
from titan_smf.reproduce.plan import Arm, Plan, given_settings, slug
from titan_smf.runtime import from_first_rank, world_size
from titan_smf.training.count_background import count_background, counting_config
from titan_smf.training.trainer import Trainer, run
from titan_smf.world.world import WORLD_VERSION

logger = logging.getLogger("titan_smf")

Weights = dict[str, torch.Tensor]
"""This rank's part of a base's parameters, by name; empty until a first trainer has read them."""


class ArmTrainer(Trainer):
    """A trainer that starts from weights in memory, which the first one of a base puts there."""

    def __init__(self, config: JobConfig, base_weights: Weights) -> None:
        super().__init__(config)
        self.base_weights = base_weights

    @torch.no_grad()
    def load_weights(self, run: str) -> Path:
        """Give the model the base's weights, read from the run's folder the first time."""
        own = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in self.model.named_parameters()
            if not is_adapter(name)  # pretraining made none
        }
        if self.base_weights:
            for name, tensor in own.items():
                tensor.copy_(self.base_weights[name])
        else:
            super().load_weights(run)
            self.base_weights |= {name: tensor.clone() for name, tensor in own.items()}
        return Path(run)


class Bases:
    """The bases of a plan for one seed, made when they are first asked for."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.seed = seed
        self.root = Path(plan.reproduce.base_folder)
        self._weights: dict[str, Weights] = {}
        first = plan.pretraining(next(iter(plan.bases)), seed)
        self._sources = [source.path for source in first.data.sources]
        size = plan.reproduce.vocabulary
        self._tokenizer = self.root / f"tokenizer-{size}-{_digest(size, self._sources)}.tiktoken"

    def pretraining(self, base: str) -> JobConfig:
        """Return the configuration of a base's pretraining, with its folder and tokenizer."""
        config = self.plan.pretraining(base, self.seed)
        self.set_tokenizer(config)
        saving = {"checkpoint.enable": True, "checkpoint.keep_latest_k": 1}
        config.update(saving, self.plan.source)
        return self._with_folder(config, f"{slug(base)}-seed{self.seed}")

    def counting(self, arm: Arm) -> JobConfig:
        """Return the configuration of the count for an arm, with the weights that it counts for."""
        config = self.plan.counting(arm, self.seed)
        self.set_tokenizer(config)
        weights = {"checkpoint.initial_load_path": self.pretraining(arm.base).job.dump_folder}
        config.update(weights, self.plan.source)
        config = counting_config(config, world_size())
        return self._with_folder(config, f"{slug(arm.base)}-seed{self.seed}-count")

    def counts_path(self, arm: Arm) -> str:
        """Return the file of the counts for an arm."""
        return str(Path(self.counting(arm).job.dump_folder, "idf.safetensors"))

    def set_tokenizer(self, config: JobConfig) -> None:
        """Name the tokenizer that is trained for this plan and seed, if it has one."""
        if self.plan.reproduce.vocabulary:
            config.update({"tokenizer.path": str(self._tokenizer)}, self.plan.source)

    def weights(self, base: str) -> Weights | None:
        """Return the weights of a base, pretrained if they are not there; None if asked to stop."""
        if base not in self._weights:
            config = self.pretraining(base)
            folder, steps = Path(config.job.dump_folder), config.training.steps
            if not from_first_rank(lambda: _last_step(folder) == f"step-{steps}"):
                logger.info("== pretraining %s, seed %d: %s", base, self.seed, folder)
                self._make_tokenizer()
                if run(config, Trainer.train) != 0:
                    return None
            self._weights[base] = {}
        return self._weights[base]

    def count(self, arm: Arm) -> bool:
        """Count the background of an arm's base if that was not done; False if asked to stop."""
        if from_first_rank(Path(self.counts_path(arm)).is_file):
            return True
        logger.info("== counting the background of %s, seed %d", arm.base, self.seed)
        return run(self.counting(arm), count_background) == 0

    def _with_folder(self, config: JobConfig, name: str) -> JobConfig:
        """Return the configuration with a folder named after its settings."""
        digest = _digest(given_settings(config), self._sources)
        config.job.dump_folder = str(self.root / f"{name}-{digest}")
        return config

    def _make_tokenizer(self) -> None:
        if size := self.plan.reproduce.vocabulary:
            with storage.locked(self._tokenizer):  # one rank trains it, the others wait
                if not self._tokenizer.is_file():
                    texts = itertools.chain.from_iterable(map(source_texts, self._sources))
                    train_rank_file(texts, size, str(self._tokenizer))


def _digest(settings: object, sources: list[str]) -> str:
    """Return ten hex digits that change with the settings, the invented world, and local files."""
    files = [Path(source) for source in sources if Path(source).is_file()]
    contents = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    content = json.dumps([settings, sources, contents, WORLD_VERSION], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def _last_step(folder: Path) -> str:
    last = folder / LAST
    return last.read_text().strip() if last.is_file() else ""
