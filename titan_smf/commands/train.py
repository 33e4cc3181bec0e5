"""Train a model as a configuration says; `titan_smf.config.help` has the help."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Train to the last step of the configuration in `argv`; returns the exit code."""
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.runtime import world_size
    from titan_smf.training.trainer import Trainer, run

    config = load_config(argv)
    check(config, world_size())
    return run(config, Trainer.train)
