"""The settings of a run, read from a file and the command line, and saved to be run again.

`load_config` reads and checks each value by itself; `titan_smf.config.checks` checks them together.
The command line wins over the file, the file over the defaults.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import tomli_w

from titan_smf.config import sections
from titan_smf.config.parsing import (
    COMMAND_LINE,
    flatten,
    read_arguments,
    read_tables,
    settings_of,
)
from titan_smf.config.refused import refusal
from titan_smf.errors import ConfigError
from titan_smf.torchtitan_api import TitanJobConfig


@dataclass
class JobConfig(TitanJobConfig):
    """All settings of a run.

    `origins` maps each setting that was given to where it was given (a file, `command line`); it is
    no setting, and equality ignores it.
    """

    model: sections.Model = field(default_factory=sections.Model)
    training: sections.Training = field(default_factory=sections.Training)
    metrics: sections.Metrics = field(default_factory=sections.Metrics)
    checkpoint: sections.Checkpoint = field(default_factory=sections.Checkpoint)
    parallelism: sections.Parallelism = field(default_factory=sections.Parallelism)
    validation: sections.Validation = field(default_factory=sections.Validation)
    memory: sections.Memory = field(default_factory=sections.Memory)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    data: sections.Data = field(default_factory=sections.Data)
    finetune: sections.Finetune = field(default_factory=sections.Finetune)
    selection: sections.Selection = field(default_factory=sections.Selection)
    lora: sections.Lora = field(default_factory=sections.Lora)
    stream: sections.Stream = field(default_factory=sections.Stream)
    replay: sections.Replay = field(default_factory=sections.Replay)
    idf: sections.Idf = field(default_factory=sections.Idf)
    analysis: sections.Analysis = field(default_factory=sections.Analysis)
    evaluation: sections.Evaluation = field(default_factory=sections.Evaluation)

    def __post_init__(self) -> None:
        self.origins: dict[str, str] = {}

    def origin(self, key: str) -> str:
        """Return where a setting was given: a file, `command line` or `default`."""
        return self.origins.get(key, "default")

    def update(self, values: Mapping[str, Any], origin: str) -> None:
        """Set settings, given by full key, and note where they come from."""
        _set(self, values)
        self.origins |= dict.fromkeys(values, origin)

    def changed(self, values: Mapping[str, Any]) -> "JobConfig":
        """Return a copy with other values of these settings or sections, of the same origins."""
        copied = copy.deepcopy(self)
        _set(copied, values)
        return copied

    @property
    def needs_counts(self) -> bool:
        """Say whether slots are ranked against the counts of background data."""
        ranked = self.finetune.method == "sparse_memory"
        return ranked and self.selection.ranking in ("tfidf", "kl")


def load_config(argv: Sequence[str]) -> JobConfig:
    """Return the settings of `--job.config FILE` and the overrides `--section.key value` in `argv`.

    Raises:
        ConfigError: anything that is not a known setting with a value of its type; names the file
            or `command line`, the key, what was given and what is allowed.
    """
    settings = settings_of(JobConfig)
    path, overrides = read_arguments(argv, settings)
    config = JobConfig()
    if path is not None:
        config.update(flatten(read_tables(path), settings, path), path)
    config.update(overrides, COMMAND_LINE)
    return config


def _set(config: JobConfig, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        *parents, name = key.split(".")
        setattr(reduce(getattr, parents, config), name, value)


def add_origin(error: ConfigError, config: JobConfig) -> None:
    """Complete an error by where its setting was given, if the error does not know that."""
    error.source = error.source or config.origin(error.key)


def save_resolved(config: JobConfig, path: str | Path) -> None:
    """Write every setting as TOML; `load_config` of the file gives an equal configuration.

    Left out are settings that are none (always the default; TOML has no word for it) and those of
    torchtitan that are refused.
    """
    lines = ["# All settings of a run with its defaults; to run it again: --job.config THIS_FILE"]
    for source in dict.fromkeys(config.origins.values()):
        keys = [key for key, origin in config.origins.items() if origin == source]
        lines.append(f"# From {source}: {', '.join(keys)}")
    values = dataclasses.asdict(config)
    tables: dict[str, Any] = {}
    for key in settings_of(JobConfig):
        *parents, name = key.split(".")
        value = reduce(getitem, parents, values)[name]
        if value is not None and refusal(key) is None:
            reduce(lambda table, part: table.setdefault(part, {}), parents, tables)[name] = value
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n\n" + tomli_w.dumps(tables), encoding="utf-8")
