"""Evaluation of a checkpoint: which settings it takes, and what it prints and writes."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from titan_smf.checkpoint.checkpointer import find_checkpoint
from titan_smf.config.checks import check
from titan_smf.config.job import JobConfig, load_config
from titan_smf.config.parsing import COMMAND_LINE, FILE_FLAG
from titan_smf.errors import ConfigError
from titan_smf.evaluation.evaluate import SetResult, evaluate
from titan_smf.runtime import StopRequest
from titan_smf.training.trainer import Trainer

logger = logging.getLogger("titan_smf")


def evaluation_config(argv: Sequence[str], world_size: int) -> JobConfig:
    """The settings of `argv` for an evaluation on `world_size` ranks.

    Without `--job.config` they are those of the run that is evaluated, whose folder then takes the
    results; how it was spread over its ranks is left behind.

    Raises:
        ConfigError: settings that do not fit, no checkpoint or no sets.
    """
    config = load_config(argv)
    run = config.checkpoint.initial_load_path
    if not run:
        allowed = "the run or checkpoint to evaluate, --checkpoint.initial_load_path RUN"
        raise ConfigError("checkpoint.initial_load_path", run, allowed)
    if set(config.where.values()) <= {COMMAND_LINE}:
        config = _config_of_run(find_checkpoint(Path(run)).parent.parent, argv)
    if not config.evaluation.sets:
        allowed = "at least one set, such as --evaluation.sets questions.jsonl"
        raise ConfigError("evaluation.sets", [], allowed)
    training = dataclasses.replace(config.training, local_batch_size=1, global_batch_size=-1)
    method = config.finetune.method
    evaluated = dataclasses.replace(
        config,
        job=dataclasses.replace(config.job, description=f"evaluation of {run}"),
        training=training,
        finetune=dataclasses.replace(
            config.finetune, method="full" if method == "sparse_memory" else method
        ),
        data=dataclasses.replace(config.data, sources=[]),
        stream=dataclasses.replace(config.stream, path=""),
        checkpoint=dataclasses.replace(config.checkpoint, enable=False),
        validation=dataclasses.replace(config.validation, enable=False),
        metrics=dataclasses.replace(config.metrics, enable_tensorboard=False),
    )
    evaluated.where = config.where
    check(evaluated, world_size, trains=False)
    return evaluated


def _config_of_run(folder: Path, argv: Sequence[str]) -> JobConfig:
    file = folder / "config.toml"
    if not file.is_file():
        allowed = f"a configuration of this model: there is no {file}"
        raise ConfigError(FILE_FLAG, None, allowed, COMMAND_LINE)
    config = load_config([f"--{FILE_FLAG}", str(file), *argv])

    def given(key: str) -> bool:
        return config.where.get(key) == COMMAND_LINE

    if not given("job.dump_folder"):
        config.job.dump_folder = str(folder)
    for name, default in (
        ("data_parallel_replicate_degree", 1),
        ("data_parallel_shard_degree", -1),
    ):
        if not given(f"parallelism.{name}"):
            setattr(config.parallelism, name, default)
    if not given("checkpoint.initial_patches"):
        config.checkpoint.initial_patches = []  # the run's checkpoints hold them
    return config


def evaluate_checkpoint(trainer: Trainer) -> bool:
    """Evaluate the weights that the trainer's configuration names; False if asked to stop.

    Writes `results.jsonl` and predictions, in which a set's result takes the place of an earlier
    one of the same checkpoint, and prints a table.
    """
    config, evaluation = trainer.job_config, trainer.evaluation
    assert config.checkpoint.initial_load_path
    path = trainer.load_weights(config.checkpoint.initial_load_path)
    number = re.fullmatch(r"step-(\d+)", path.name)
    step = int(number[1]) if number else 0
    checkpoint = " + ".join([str(path), *config.checkpoint.initial_patches])
    results: list[SetResult] = []
    trainer.stop = StopRequest()
    try:
        for each in evaluation.sets:
            settings = config.evaluation
            found = evaluate(evaluation.model, [each], settings.batch_size, settings.resamples)
            if not found:
                break
            evaluation.results.add(found[0], step, checkpoint)
            results += found
    finally:
        trainer.stop.restore()
    if dist.get_rank() == 0:
        print(table(results))
        logger.info("Wrote %s", evaluation.results.path)
    return len(results) == len(evaluation.sets)


def table(results: Sequence[SetResult]) -> str:
    """One line for each metric of each set, with its 95% interval."""
    lines = [("set", "items", "metric", "mean", "95% interval", "seconds")]
    for result in results:
        lines += [
            (
                result.name,
                f"{result.count:,}",
                name,
                f"{value.mean:.4f}",
                f"{value.low:.4f} to {value.high:.4f}",
                f"{result.seconds:.1f}",
            )
            for name, value in result.metrics.items()
        ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
