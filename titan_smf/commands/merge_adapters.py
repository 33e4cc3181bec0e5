"""Fold LoRA adapters into the weights that they were trained on.

    tools/merge_adapters.py BASE ADAPTERS --output FOLDER

BASE is a step-N folder, or a run's folder for its newest checkpoint. ADAPTERS is the folder of a
run with finetune.method lora, or any with PEFT's two files. Of weights that such a run did not
start from, its adapters are refused. FOLDER gets weights alone, for checkpoint.initial_load_path of
a run without adapters. Exit codes: 0 done, 2 a mistake.
"""

from collections.abc import Sequence
from pathlib import Path

from titan_smf.commands.entry import make_parser


def main(argv: Sequence[str]) -> None:
    """Write the merged weights."""
    parser = make_parser(__doc__)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("adapters", type=Path, metavar="ADAPTERS")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    from titan_smf.checkpoint.merge_adapters import merge_adapters

    merge_adapters(args.base, args.adapters, args.output, report=print)
