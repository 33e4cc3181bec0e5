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


def main() -> int:
    """Entry point; returns the exit code."""
    run, shards = Path(sys.argv[1]), sys.argv[2]
    lines = read_metrics(run)
    entropy = unigram_entropy(TokenShards(shards))
    final = lines[-1][VALIDATION]
    print(f"""
Loss in nats a token, on text that was not trained on:
  {lines[0]["loss"]:.2f}  before training
  {entropy:.2f}  a model that knows only how frequent each token is (unigram entropy)
  {final:.2f}  this model, after {lines[-1]["step"]} steps
Of the memory's slots, one batch uses {lines[-1]["memory/slots_used_fraction"]:.0%}.
""")
    draw(run / "loss.png", lines, entropy)
    print(f"Look at:   {run}/loss.png  {run}/metrics.jsonl  {run}/config.toml  {run}/checkpoints")
    print(f"           tensorboard --logdir {run}/tb")
    print("Try next:  tools/demo.sh --training.steps 2000    goes on from here")
    print("           python -m titan_smf.train --help         for all settings")
    return 0 if final < entropy else 1


def draw(path: Path, lines: list[dict[str, float]], entropy: float) -> None:
    """The loss on both kinds of text over the steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training")
    checked = [line for line in lines if VALIDATION in line]
    axes.plot(
        [line["step"] for line in checked],
        [line[VALIDATION] for line in checked],
        "o-",
        label="validation",
    )
    axes.axhline(entropy, linestyle="--", color="gray", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
