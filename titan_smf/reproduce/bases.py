"""The pretrained models that methods begin with, their counts, and their weights in memory.

Each is kept in a folder named by a hash of the settings that its plan gives: the same settings find
it again, other settings make another one. A pretraining or a count that was stopped goes on.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
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


class BaseWeights:
    """The weights of a base, read once; each rank keeps its own part in memory."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def load_into(self, model: nn.Module, read: Callable[[], object]) -> None:
        """Give a model the weights, which `read` gives it the first time. Collective."""
        tensors = {name: _local(tensor) for name, tensor in _base_tensors(model).items()}
        if self._tensors:
            for name, tensor in tensors.items():
                tensor.copy_(self._tensors[name])
        else:
            read()
            self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}


class Bases:
    """The bases of a plan for one seed, made when they are first asked for."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.seed = seed
        self.root = Path(plan.reproduce.base_folder)
        self._weights: dict[str, BaseWeights] = {}

    def pretraining(self, base: str) -> JobConfig:
        """The configuration of a base's pretraining, complete with folder and tokenizer."""
        config = self.plan.pretraining(base, self.seed)
        self.set_tokenizer(config)
        saving = {"checkpoint.enable": True, "checkpoint.keep_latest_k": 1}
        config.update(saving, self.plan.source)
        return self._placed(config, f"{slug(base)}-seed{self.seed}")

    def counting(self, arm: Arm) -> JobConfig:
        """The configuration of the count for an arm, complete with the weights it is for."""
        config = self.plan.counting(arm, self.seed)
        self.set_tokenizer(config)
        weights = {"checkpoint.initial_load_path": self.pretraining(arm.base).job.dump_folder}
        config.update(weights, self.plan.source)
        config = counting_config(config, world_size())
        return self._placed(config, f"{slug(arm.base)}-seed{self.seed}-count")

    def counts_path(self, arm: Arm) -> str:
        """The file of the counts for an arm."""
        return str(Path(self.counting(arm).job.dump_folder, "idf.safetensors"))

    def set_tokenizer(self, config: JobConfig) -> None:
        """Name the tokenizer that is trained for this plan and seed, if it has one."""
        if self.plan.reproduce.vocabulary:
            path = {"tokenizer.path": str(self._tokenizer_path())}
            config.update(path, self.plan.source)

    def weights(self, base: str) -> BaseWeights | None:
        """The weights of a base, pretrained if they are not there; None if asked to stop."""
        if base not in self._weights:
            config = self.pretraining(base)
            folder = Path(config.job.dump_folder)
            if not _is_finished(folder, config.training.steps):
                logger.info("== pretraining %s, seed %d: %s", base, self.seed, folder)
                self._make_tokenizer()
                if run(config, Trainer.train) != 0:
                    return None
            self._weights[base] = BaseWeights()
        return self._weights[base]

    def count(self, arm: Arm) -> bool:
        """Count the background of an arm's base if that was not done; False if asked to stop."""
        if from_first_rank(Path(self.counts_path(arm)).is_file):
            return True
        logger.info("== counting the background of %s, seed %d", arm.base, self.seed)
        return run(self.counting(arm), count_background) == 0

    def _placed(self, config: JobConfig, name: str) -> JobConfig:
        """The configuration with a folder named by what it says."""
        digest = _digest(given_settings(config), self._tokenizer_sources())
        config.job.dump_folder = str(self.root / f"{name}-{digest}")
        return config

    def _tokenizer_path(self) -> Path:
        sources = self._tokenizer_sources()
        size = self.plan.reproduce.vocabulary
        digest = _digest(size, sources)
        return self.root / f"tokenizer-{size}-{digest}.tiktoken"

    def _tokenizer_sources(self) -> list[str]:
        config = self.plan.pretraining(next(iter(self.plan.bases)), self.seed)
        return [source.path for source in config.data.sources]

    def _make_tokenizer(self) -> None:
        path, size = self._tokenizer_path(), self.plan.reproduce.vocabulary
        if size:
            with storage.locked(path):  # one rank trains it, the others wait
                if not path.is_file():
                    texts = map(source_texts, self._tokenizer_sources())
                    train_rank_file(itertools.chain.from_iterable(texts), size, str(path))


def _digest(settings: object, sources: Sequence[str]) -> str:
    """Ten hex digits that change with the settings, the invented world, and local files."""
    files = [Path(source) for source in sources if Path(source).is_file()]
    contents = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    content = json.dumps([settings, sources, contents, WORLD_VERSION], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def _is_finished(folder: Path, steps: int) -> bool:
    last = folder / LAST
    return bool(
        from_first_rank(lambda: last.is_file() and last.read_text().strip() == f"step-{steps}")
    )


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that pretraining made, by name: all but those of adapters."""
    return {name: p for name, p in model.named_parameters() if not is_adapter(name)}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
