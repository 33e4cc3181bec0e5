#!/usr/bin/env python
"""Ask a trained model questions, and measure what it answers."""

from titan_smf.commands import evaluate
from titan_smf.commands.entry import start_on_ranks

if __name__ == "__main__":
    start_on_ranks(evaluate.main, evaluate.__doc__)
