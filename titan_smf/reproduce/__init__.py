"""Comparisons of methods: one plan names the models, the methods, their rates and the seeds.

    plan.py -> bases.py (pretrained models and counts) -> runner.py -> runs.py -> summary.py

In comes a plan, a TOML file; out go the folders of its runs, the chosen rates and a report for each
group of arms. Nothing but `commands` imports it.
"""
