#!/usr/bin/env python
"""Turn text into token shards, the form in which training reads it."""

from titan_smf.commands.entry import start
from titan_smf.commands.prepare_data import main

if __name__ == "__main__":
    start(main)
