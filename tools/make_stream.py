#!/usr/bin/env python
"""Make what a model is to learn: a fact stream, a document stream, or text that states facts."""

from titan_smf.commands.entry import start
from titan_smf.commands.make_stream import main

if __name__ == "__main__":
    start(main)
