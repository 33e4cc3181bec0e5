"""Entry of training: `python -m titan_smf.train --job.config FILE`, also under torchrun."""

from titan_smf.commands import train
from titan_smf.commands.entry import start_on_ranks
from titan_smf.config.help import usage

if __name__ == "__main__":
    start_on_ranks(train.main, usage())
