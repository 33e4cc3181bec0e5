"""The rows that sparse finetuning changed, as a small file.

    tools/patch.py export BASE FINETUNED --output patch.safetensors
    tools/patch.py apply BASE PATCH ... --output FOLDER
    tools/patch.py revert FINETUNED PATCH ... --output FOLDER
    tools/patch.py show PATCH ...
    tools/patch.py merge PATCH PATCH ... --output patch.safetensors

BASE and FINETUNED are step-N folders, or runs' folders for their newest checkpoint. Patches are in
the order in which they were made, also to revert them; weights that are not theirs are refused.
FOLDER gets weights alone, for checkpoint.initial_load_path. Exit codes: 0 done, 2 a mistake.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from titan_smf.commands.entry import make_parser

# command, what it does, the checkpoints it takes, its output
COMMANDS: list[tuple[str, str, list[str], str]] = [
    ("export", "make the patch of two checkpoints", ["base", "finetuned"], "path or URL"),
    ("apply", "change a checkpoint by patches", ["base"], "new folder"),
    ("revert", "take patches back from a checkpoint", ["finetuned"], "new folder"),
    ("show", "say what patches hold", [], ""),
    ("merge", "make one patch of several", [], "path or URL"),
]
OVERLAP = "rows changed by several patches of one base: refuse, the last patch's, sum of changes"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command and its arguments."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, meaning, checkpoints, output in COMMANDS:
        command = commands.add_parser(name, help=meaning, description=meaning)
        for checkpoint in checkpoints:
            command.add_argument(checkpoint, type=Path, metavar=checkpoint.upper())
        if name != "export":
            command.add_argument("patches", nargs="+", metavar="PATCH", help="path or URL")
        if output:
            command.add_argument("--output", required=True, help=output)
    commands.choices["export"].add_argument("--data", default="", help="what was learned, in words")
    commands.choices["merge"].add_argument(
        "--on-overlap", choices=["refuse", "last", "sum"], default="refuse", help=OVERLAP
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Do what the command says, and print what the patches hold."""
    args = parse_arguments(argv)
    from titan_smf.checkpoint.patch import merge, slots_text
    from titan_smf.checkpoint.patch_checkpoints import apply_patches, export_patch, revert_patches
    from titan_smf.checkpoint.patch_file import describe_patch, load_patch, save_patch

    patches = [] if args.command == "export" else [load_patch(path) for path in args.patches]
    if args.command == "show":
        print("\n\n".join(map(describe_patch, args.patches, patches)))
    elif args.command == "apply":
        apply_patches(args.base, patches, Path(args.output), report=print)
    elif args.command == "revert":
        revert_patches(args.finetuned, patches, Path(args.output), report=print)
    else:
        if args.command == "export":
            patch = export_patch(args.base, args.finetuned, args.data, report=print)
        else:
            patch, shared = merge(patches, args.on_overlap)
            print(f"Changed by several patches of one base: {slots_text(shared)}")
        save_patch(args.output, patch)
        print(describe_patch(args.output, patch))
