#!/usr/bin/env python
"""Compare methods of learning new facts: what each learns, what it forgets."""

from titan_smf.commands import reproduce
from titan_smf.commands.entry import start_on_ranks

if __name__ == "__main__":
    start_on_ranks(reproduce.main, reproduce.__doc__)
