"""Train a model as a configuration says: `python -m titan_smf.train --job.config FILE`.

Under torchrun every process runs this; launched plainly it is a run on one process. Exit codes: 0
done, 2 a mistake in what was given, 75 stopped on request with a checkpoint to go on from.
"""

import sys
from collections.abc import Sequence

from titan_smf.config.help import print_help


def main(argv: Sequence[str]) -> int:
    """Train to the last step of the configuration in `argv`; returns the exit code."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.runtime import world_size
    from titan_smf.training.trainer import Trainer, run

    config = load_config(argv)
    check(config, world_size())
    return run(config, Trainer.train)


if __name__ == "__main__":
    if print_help(sys.argv[1:]):
        sys.exit(0)
    from titan_smf.runtime import end_process, run_entry_point

    end_process(run_entry_point(main, sys.argv[1:]))
