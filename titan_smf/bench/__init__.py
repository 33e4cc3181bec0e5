"""Performance as ratios: ours and the plain alternative, timed in turns in one run."""
