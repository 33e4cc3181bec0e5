#!/usr/bin/env python
"""Measures performance on the CPU against plain alternatives timed in the same run.

python tools/bench.py                        everything
python tools/bench.py --only product_key     one group of measures
"""

import argparse
from collections.abc import Callable

import torch

from titan_smf.bench import generation, lookup, ranks, sparse, step, training
from titan_smf.bench.measure import Measure, table

GROUPS: dict[str, Callable[[int], list[Measure]]] = {
    "product_key": lookup.product_key,
    "forward": lookup.forward,
    "backward": lookup.backward,
    "bytes": lookup.wire_bytes,
    "memory": lookup.memory,
    "sparse": sparse.sparse,
    "ranks": ranks.ranks,
    "whole_step": step.whole_step,
    "step_time": training.step_time,
    "finetuning": training.finetuning,
    "run_memory": training.run_memory,
    "generation": generation.generation,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=GROUPS, action="append", help="may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each alternative")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measures = []
    for name in options.only or GROUPS:
        measures += GROUPS[name](options.runs)
    print(f"{options.threads} threads, median of {options.runs}, torch {torch.__version__}")
    print(table(measures))


if __name__ == "__main__":
    main()
