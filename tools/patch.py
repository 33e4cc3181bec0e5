#!/usr/bin/env python
"""The rows that sparse finetuning changed, as a small file."""

from titan_smf.commands.entry import start
from titan_smf.commands.patch import main

if __name__ == "__main__":
    start(main)
