"""Ask a trained model questions, and measure what it answers.

    tools/evaluate.py --checkpoint.initial_load_path outputs/run --evaluation.sets nq.jsonl,b.jsonl
    torchrun --nproc_per_node 8 tools/evaluate.py --job.config train_configs/evaluate.toml \\
        --checkpoint.initial_load_path outputs/run

Without --job.config the model's settings are those of the run, and the results go to its folder.
Sets are files (jsonl, csv, parquet), globs, URLs, hf:NAME, synthetic:world?..., or NAME=PATH; what
is measured follows from their fields: F1 and exact match of answers to questions, accuracy of
multiple choice, likelihood of given answers, loss on text. --help evaluation lists all settings.

Writes results.jsonl and predictions/SET.jsonl to job.dump_folder, and prints a table.
Exit codes: 0 done, 2 a mistake, 75 stopped on request.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_smf.errors import ConfigError

if TYPE_CHECKING:
    from titan_smf.config.job import JobConfig
    from titan_smf.training.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint; returns the exit code."""
    from titan_smf.runtime import world_size
    from titan_smf.training.trainer import run

    return run(evaluation_config(argv, world_size()), evaluate_checkpoint)


def evaluation_config(argv: Sequence[str], world_size: int) -> "JobConfig":
    """Return the settings of an evaluation on `world_size` ranks.

    Without `--job.config` they are those of the run that is evaluated, whose folder then takes the
    results, except how that run was spread over its ranks.

    Raises:
        ConfigError: settings that do not fit, no checkpoint or no sets.
    """
    from titan_smf.checkpoint.checkpointer import find_checkpoint
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.config.parsing import COMMAND_LINE

    config = load_config(argv)
    run = config.checkpoint.initial_load_path
    if not run:
        allowed = "the run or checkpoint to evaluate, --checkpoint.initial_load_path RUN"
        raise ConfigError("checkpoint.initial_load_path", run, allowed)
    if set(config.origins.values()) <= {COMMAND_LINE}:
        config = _config_of_run(find_checkpoint(Path(run)).parent.parent, argv)
    if not config.evaluation.sets:
        allowed = "at least one set, such as --evaluation.sets questions.jsonl"
        raise ConfigError("evaluation.sets", [], allowed)
    method = config.finetune.method
    evaluated = config.changed(
        {
            "job.description": f"evaluation of {run}",
            "training.local_batch_size": 1,
            "training.global_batch_size": -1,
            "finetune.method": "full" if method == "sparse_memory" else method,
            "data.sources": [],
            "stream.path": "",
            "checkpoint.enable": False,
            "validation.enable": False,
            "metrics.enable_tensorboard": False,
        }
    )
    check(evaluated, world_size, trains=False)
    return evaluated


def _config_of_run(folder: Path, argv: Sequence[str]) -> "JobConfig":
    from titan_smf.config.job import load_config
    from titan_smf.config.parsing import COMMAND_LINE, FILE_FLAG

    file = folder / "config.toml"
    if not file.is_file():
        allowed = f"a configuration of this model: there is no {file}"
        raise ConfigError(FILE_FLAG, None, allowed, COMMAND_LINE)
    config = load_config([f"--{FILE_FLAG}", str(file), *argv])
    unless_given = {
        "job.dump_folder": str(folder),
        "parallelism.data_parallel_replicate_degree": 1,
        "parallelism.data_parallel_shard_degree": -1,
        "checkpoint.initial_patches": [],  # the run's checkpoints hold them
    }
    return config.changed(
        {key: value for key, value in unless_given.items() if config.origin(key) != COMMAND_LINE}
    )


def evaluate_checkpoint(trainer: "Trainer") -> bool:
    """Evaluate the weights that the trainer's configuration names; False if asked to stop.

    Writes `results.jsonl` and predictions, in which a set's result takes the place of an earlier
    one of the same checkpoint, and prints a table.
    """
    from titan_smf.runtime import is_first_rank, logger

    config, evaluation = trainer.job_config, trainer.evaluation
    assert config.checkpoint.initial_load_path
    path = trainer.load_weights(config.checkpoint.initial_load_path)
    number = re.fullmatch(r"step-(\d+)", path.name)
    step = int(number[1]) if number else 0
    checkpoint = " + ".join([str(path), *config.checkpoint.initial_patches])
    results = []
    with trainer.stop:
        for task in evaluation.tasks:
            result = evaluation.evaluate(task, step, checkpoint)
            if result is None:
                break
            results.append(result)
    if is_first_rank():
        print(table(results))
        logger.info("Wrote %s", evaluation.results.path)
    return len(results) == len(evaluation.tasks)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return one line for each metric of each result, with its 95% interval."""
    from titan_smf.runtime import format_table

    lines = [("set", "items", "metric", "mean", "95% interval", "seconds")]
    for result in results:
        items, seconds = f"{result['count']:,}", f"{result['seconds']:.1f}"
        for name, value in result["metrics"].items():
            interval = f"{value['low']:.4f} to {value['high']:.4f}"
            mean = f"{value['mean']:.4f}"
            lines.append((result["set"], items, name, mean, interval, seconds))
    return format_table(lines)
