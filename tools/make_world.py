#!/usr/bin/env python
"""Write a small invented world: its text, new facts to learn, and questions about known ones."""

from titan_smf.commands.entry import start
from titan_smf.commands.make_world import main

if __name__ == "__main__":
    start(main)
