"""Settings of a run: typed sections, read from TOML and the command line, checked, saved.

In: `--job.config FILE --section.key value`. Out: a `JobConfig`, `config.toml`, and what `--help`
prints, which needs no torch. Knows nothing of models or data; whoever uses a setting checks what
the settings alone cannot say. May import torchtitan_api, runtime, storage and errors.
"""
