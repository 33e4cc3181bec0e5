#!/usr/bin/env python
"""Fold LoRA adapters into the weights that they were trained on."""

from titan_smf.commands.entry import start
from titan_smf.commands.merge_adapters import main

if __name__ == "__main__":
    start(main)
