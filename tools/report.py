#!/usr/bin/env python
"""What finished runs learned and forgot: tables and pictures as markdown and as one HTML page."""

from titan_smf.commands.entry import start
from titan_smf.commands.report import main

if __name__ == "__main__":
    start(main)
