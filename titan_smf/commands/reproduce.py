"""Compare methods of learning new facts: what each learns, what it forgets.

    tools/reproduce.py --job.config train_configs/reproduce_cpu.toml
    torchrun --nproc_per_node 8 tools/reproduce.py --job.config train_configs/reproduce_paper.toml

The file names the models to begin with, the methods, their rates and the seeds (plan.py of
titan_smf/reproduce says how). All runs in one process group; what is complete is not run again, so
the same command goes on after a stop. Processes may share the work by seeds, `--reproduce.seeds 1`,
and once the models are there by arms, `--reproduce.arms core` (names with commas:
`'["a, b", "c"]'`); the command without these then reports on all of it. Settings of a phase:
`--pretrain.training.steps 100`.

At the end there is a report for each group of arms in `reproduce.folder`, on the seeds and arms of
this call. Exit codes: 0 done, 2 a mistake, 75 stopped.
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run what is left of a plan, then write its report; returns the exit code."""
    from titan_smf.reproduce.plan import read_plan
    from titan_smf.reproduce.runner import Runner
    from titan_smf.reproduce.summary import summary, write_reports
    from titan_smf.runtime import EXIT_STOPPED, rank

    plan = read_plan(argv)
    if not Runner(plan).run():
        return EXIT_STOPPED
    if rank() == 0:
        print(f"\n{summary(plan)}\n")
        print("Look at: ", "\n          ".join(map(str, write_reports(plan))))
    return 0
