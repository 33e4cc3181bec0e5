"""Performance as ratios: ours and the plain alternative, timed in turns in one run.

Each group of measures is a generator function that takes the number of timed runs and yields a
`Measure` as soon as it is known; `commands/bench.py` lists the groups and prints what they yield.
Everything else of the package may be imported here, except `commands`.
"""
