#!/usr/bin/env python
"""Measure performance on the CPU, against plain alternatives timed in the same run."""

from titan_smf.commands.bench import main
from titan_smf.commands.entry import start

if __name__ == "__main__":
    start(main)
