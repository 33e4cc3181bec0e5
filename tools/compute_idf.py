#!/usr/bin/env python
"""Count in how many batches of background data each memory slot is used."""

from titan_smf.commands import compute_idf
from titan_smf.commands.entry import start_on_ranks

if __name__ == "__main__":
    start_on_ranks(compute_idf.main, compute_idf.__doc__)
