#!/usr/bin/env python
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

import sys
from collections.abc import Sequence

from titan_smf.config.help import print_help


def main(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint; returns the exit code."""
    from titan_smf.commands.evaluate import evaluate_checkpoint, evaluation_config
    from titan_smf.runtime import world_size
    from titan_smf.training.trainer import run

    return run(evaluation_config(argv, world_size()), evaluate_checkpoint)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    if print_help(arguments):
        sys.exit(0)
    from titan_smf.runtime import end_process, run_entry_point

    end_process(run_entry_point(main, arguments))
