"""Whole jobs: what `tools/*.py` and `python -m titan_smf.train` run.

A command is a module with `main(argv)`, which returns the exit code, and its help as the docstring.
It imports torch only when it runs, so that `--help` is immediate. May import every other room; only
`tools/` and `titan_smf/train.py` import it.
"""
