#!/usr/bin/env python
"""Analyse which memory slots hold a fact, and what each ranking finds of them."""

from titan_smf.commands import analyse_accesses
from titan_smf.commands.entry import start_on_ranks

if __name__ == "__main__":
    start_on_ranks(analyse_accesses.main, analyse_accesses.__doc__)
