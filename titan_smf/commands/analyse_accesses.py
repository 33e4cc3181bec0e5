"""Analyse which memory slots hold a fact, and what each ranking finds of them. Nothing is trained.

    torchrun --nproc_per_node 2 tools/analyse_accesses.py --job.config CONFIG.toml \\
        --checkpoint.initial_load_path RUN --selection.idf_path idf.safetensors \\
        --job.dump_folder FOLDER

CONFIG.toml is that of a sparse finetuning run: its stream, batch, ranking and top_t are analysed.
Settings are those of training (`--section.key value`); [analysis] says how many facts or documents
and which numbers of slots. Writes access_analysis.json, access_analysis.html and pictures into
job.dump_folder. Exit codes: 0 done, 2 a mistake.
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Analyse; returns the exit code."""
    from titan_smf.analysis.access_analysis import analysis_config, write_analysis
    from titan_smf.analysis.access_report import ANALYSIS_FILE, FRAGMENT_FILE, text_summary
    from titan_smf.config.checks import check
    from titan_smf.config.job import load_config
    from titan_smf.runtime import world_size
    from titan_smf.training.trainer import Trainer, run

    def analyse_and_print(trainer: Trainer) -> bool:
        if analysis := write_analysis(trainer):
            print(text_summary(analysis))
            print(f"Wrote {trainer.folder / ANALYSIS_FILE}, {FRAGMENT_FILE} and pictures beside it")
        return True

    config = analysis_config(load_config(argv))
    check(config, world_size())
    return run(config, analyse_and_print)
