#!/usr/bin/env python
"""Say what the demo's run has learned, against a model that ignores context, and draw it.

    python tools/demo_summary.py RUN VALIDATION_SHARDS

Prints the losses beside the unigram entropy of the validation data and draws RUN/loss.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from titan_smf.data.token_shards import TokenShards, unigram_entropy
from titan_smf.metrics import read_metrics

VALIDATION = "evaluation/validation/loss"
SLOTS_USED = "memory/slots_used_fraction"


def main() -> int:
    """Entry point; returns the exit code."""
    run, shards = Path(sys.argv[1]), sys.argv[2]
    lines = read_metrics(run)
    last = lines[-1]
    entropy = unigram_entropy(TokenShards(shards))
    print(f"""
Loss in nats a token, on text that was not trained on:
  {lines[0]["loss"]:.2f}  before training
  {entropy:.2f}  a model that knows only how frequent each token is (unigram entropy)
  {last[VALIDATION]:.2f}  this model, after {last["step"]} steps
""")
    if SLOTS_USED in last:
        print(f"One batch uses {last[SLOTS_USED]:.0%} of the memory's slots.\n")
    draw(run / "loss.png", lines, entropy)
    print(f"Look at:   {run}/loss.png  {run}/metrics.jsonl  {run}/config.toml  {run}/checkpoints")
    print(f"           tensorboard --logdir {run}/tb")
    print("Try next:  tools/demo.sh --training.steps 2000    goes on from here")
    print("           python -m titan_smf.train --help         for all settings")
    return 0


def draw(path: Path, lines: list[dict[str, float]], entropy: float) -> None:
    """The loss on both kinds of text over the steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, marker, label in (("loss", "-", "training"), (VALIDATION, "o-", "validation")):
        with_it = [line for line in lines if name in line]
        axes.plot(
            [line["step"] for line in with_it],
            [line[name] for line in with_it],
            marker,
            label=label,
        )
    axes.axhline(entropy, linestyle="--", color="gray", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
