"""Analyse which memory slots hold a fact, and what each ranking finds of them. Nothing is trained.

    torchrun --nproc_per_node 2 tools/analyse_accesses.py --job.config CONFIG.toml \\
        --checkpoint.initial_load_path RUN --selection.idf_path idf.safetensors \\
        --job.dump_folder FOLDER

CONFIG.toml is that of a sparse finetuning run: its stream, batch, ranking and top_t are analysed.
Settings are those of training (`--section.key value`); [analysis] says how many facts or documents
and which numbers of slots. Writes access_analysis.json, access_analysis.html and pictures into
job.dump_folder. Exit codes: 0 done, 2 a mistake.
"""

import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Analyse; returns the exit code."""
    from titan_smf.analysis.access_analysis import FRAGMENT_FILE, analyse_accesses
    from titan_smf.analysis.access_report import ANALYSIS_FILE, text_summary
    from titan_smf.analysis.analysis_config import analysis_config
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.runtime import rank, world_size
    from titan_smf.training.trainer import run

    config = analysis_config(load_config(argv))
    check(config, world_size())
    code = run(config, analyse_accesses)
    if code == 0 and rank() == 0:
        file = Path(config.job.dump_folder, ANALYSIS_FILE)
        print(text_summary(json.loads(file.read_text())))
        print(f"Wrote {file}, {FRAGMENT_FILE} and pictures beside it")
    return code
