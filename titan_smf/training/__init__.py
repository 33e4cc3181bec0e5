"""Training: torchtitan's trainer with our steps, and everything a run keeps beside its model.

In: a checked `JobConfig`. Out: checkpoints, metrics, patch or adapters in the run's folder; or, by
a pass over background data, the counts that rank slots. May use every room below it, but no room
that uses the trainer: analysis, report, reproduce, bench, commands.
"""
