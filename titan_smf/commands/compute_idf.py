"""Count in how many batches of background data each memory slot is used.

    torchrun --nproc_per_node 8 tools/compute_idf.py --job.config train_configs/compute_idf.toml
    tools/compute_idf.py merge PART.safetensors ... --output idf.safetensors

Settings are those of training (`--section.key value`); [idf] says how much is counted. The result,
`idf.safetensors`, is what `selection.idf_path` needs. Stopped and started again, a count goes on.
`merge` adds up files of independent jobs. Exit codes: 0 done, 2 a mistake, 75 stopped on request.
"""

from collections.abc import Sequence

from titan_smf.commands.entry import make_parser


def main(argv: Sequence[str]) -> int:
    """Count, or merge counts; returns the exit code."""
    if argv[:1] == ["merge"]:
        return merge(argv[1:])
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.runtime import world_size
    from titan_smf.training.count_background import count_background, counting_config
    from titan_smf.training.trainer import run

    config = counting_config(load_config(argv), world_size())
    check(config, world_size())
    return run(config, count_background)


def merge(argv: Sequence[str]) -> int:
    """Add up files of counts; returns the exit code."""
    from titan_smf.sparse.idf_file import merge_idf, what_is_missing

    parser = make_parser(None)
    parser.prog = "tools/compute_idf.py merge"
    parser.add_argument("parts", nargs="+", metavar="PART", help="files of counts")
    parser.add_argument("--output", required=True, help="path or URL of the sum")
    args = parser.parse_args(argv)
    metadata = merge_idf(args.parts, args.output)
    print(f"{args.output}: {metadata.documents} documents of {len(args.parts)} files")
    if lacking := what_is_missing(metadata):
        print(f"It is not complete: {lacking}")
    return 0
