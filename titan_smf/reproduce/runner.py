"""Runs a plan: every arm at every rate and seed, each once, in one process group.

    for each seed
        pretrain the bases, count their background      kept, see bases.py
        for each arm and each of its rates
            on the tuning facts (tuning seed only)      restore the base in memory, learn, evaluate
            on the reported facts                       the same
    choose a rate for each arm by the tuning facts      chosen.json
    analyse which slots hold the facts                  for each seed, with one arm

A run that is complete is not run again, so a plan that was stopped goes on where it was, and
several processes may share one plan, each with seeds of its own.
"""

import functools
import gc
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from titan_smf.analysis.access_analysis import analyse_accesses
from titan_smf.analysis.access_report import ANALYSIS_FILE
from titan_smf.analysis.analysis_config import analysis_config
from titan_smf.checkpoint.checkpointer import describe_difference
from titan_smf.config.checks import check
from titan_smf.config.job import JobConfig
from titan_smf.errors import ConfigError
from titan_smf.evaluation.sets import complete_sets
from titan_smf.progress import format_duration
from titan_smf.reproduce.bases import ArmTrainer, Bases
from titan_smf.reproduce.plan import Plan, given_settings
from titan_smf.reproduce.runs import COMPLETE, Run, planned_runs, save_rates
from titan_smf.runtime import from_first_rank, rank, world_size
from titan_smf.storage import write_json
from titan_smf.streams.records import open_stream
from titan_smf.training.trainer import Trainer
from titan_smf.training.trainer import run as run_trainer

logger = logging.getLogger("titan_smf")


class Runner:
    """Runs what is left of a plan and says how long that takes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runs = list(planned_runs(plan))
        self.bases = {seed: Bases(plan, seed) for seed in plan.reproduce.seeds}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """What complete runs took, by arm."""
        self.warned: set[str] = set()

    def run(self) -> bool:
        """Run to the end of the plan; False if asked to stop before."""
        self._check()
        left = [run for run in self.runs if not self._is_complete(run)]
        total, done = len(self.runs), len(self.runs) - len(left)
        logger.info("%d runs, %d of them complete already", total, done)
        for number, run in enumerate(left, start=1):
            logger.info("run %d/%d: %s", done + number, total, run)
            begin = time.perf_counter()
            if not self._run(run):
                logger.info("Stopped on request; the same command goes on from here")
                return False
            self._record(run, time.perf_counter() - begin)
            self._print_progress(run, left[number:])
        if rank() == 0:
            save_rates(self.plan)
        for seed in self.bases:
            self._analyse(seed)
        return True

    def configuration(self, run: Run) -> JobConfig:
        """Return the configuration of one run, with its base and the counts that it needs."""
        bases = self.bases[run.seed]
        config = self.plan.learning(run.arm, run.seed, run.rate, run.tuning)
        bases.set_tokenizer(config)
        places: dict[str, Any] = {
            "job.dump_folder": str(run.folder),
            "checkpoint.enable": False,
            "checkpoint.initial_load_path": bases.pretraining(run.arm.base).job.dump_folder,
            "metrics.enable_tensorboard": False,
        }
        if config.needs_counts:
            places["selection.idf_path"] = bases.counts_path(run.arm)
        config.update(places, self.plan.source)
        return config

    def _run(self, run: Run) -> bool:
        config, bases = self.configuration(run), self.bases[run.seed]
        weights = bases.weights(run.arm.base)
        if weights is None or (config.needs_counts and not bases.count(run.arm)):
            return False
        gc.collect()  # the trainer before: its parts refer to each other
        level = logger.level
        logger.setLevel(logging.WARNING)  # a line for each run is enough
        logger.addFilter(self._is_news)
        try:
            build = functools.partial(ArmTrainer, base_weights=weights)
            return run_trainer(config, Trainer.train, build) == 0
        finally:
            logger.removeFilter(self._is_news)
            logger.setLevel(level)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Let a warning through the first time: a base's is the same in each of its runs."""
        if record.levelno != logging.WARNING:
            return True
        is_new = record.getMessage() not in self.warned
        self.warned.add(record.getMessage())
        return is_new

    def _analyse(self, seed: int) -> None:
        """Analyse accesses with the first arm that uses counts, if any does."""
        reported = (run for run in self.runs if run.seed == seed and not run.tuning)
        configs = (config for config in map(self.configuration, reported) if config.needs_counts)
        if (config := next(configs, None)) is None:
            return
        folder = self._analysis_folder(seed)
        config.update({"job.dump_folder": str(folder)}, self.plan.source)
        if not from_first_rank((folder / ANALYSIS_FILE).is_file):
            logger.info("== analysing accesses, seed %d: %s", seed, folder)
            run_trainer(analysis_config(config), analyse_accesses)

    def _analysis_folder(self, seed: int) -> Path:
        return Path(self.plan.reproduce.folder, "analysis", f"seed-{seed}")

    def _check(self) -> None:
        """Find the mistakes of the whole plan before its first run."""
        folder = Path(self.plan.reproduce.folder)
        analyses = map(self._analysis_folder, self.bases)
        places = [*(run.folder for run in self.runs), *analyses, folder / "report"]
        above = (above for place in places for above in (place, *place.parents))
        if file := next(filter(Path.is_file, above), None):
            allowed = f"a folder of runs, reports and analyses: {file} is a file"
            raise ConfigError("reproduce.folder", str(folder), allowed)
        streams = set()
        for run in self.runs:
            bases = self.bases[run.seed]
            try:
                learning = self.configuration(run)
                configs = [bases.pretraining(run.arm.base), learning]
                if learning.needs_counts:
                    configs.append(bases.counting(run.arm))
                for config in configs:
                    check(config, world_size())
                roles = {given.role for given in complete_sets(learning.evaluation)}
            except ConfigError as error:
                error.source = f"{error.source or self.plan.source}, {run}"
                raise
            if "target" not in roles:
                allowed = 'sets of which one has role = "target", to see what was learned'
                raise ConfigError("learn.evaluation.sets", list(roles), allowed, self.plan.source)
            if learning.stream.path:
                streams.add((learning.stream.path, learning.stream.kind))
        for path, kind in sorted(streams):  # on every rank: there is no process group yet
            open_stream(path, kind)

    def _is_complete(self, run: Run) -> bool:
        """Return whether there are results of a run, by the settings that it has now. Collective.

        Raises:
            ConfigError: there are, by other settings.
        """
        done = from_first_rank(run.completed)
        if done is None:
            return False
        settings = given_settings(self.configuration(run))
        if difference := describe_difference(done["settings"], settings):
            allowed = f"a new folder, or one without {run.folder}, where {difference}"
            raise ConfigError("reproduce.folder", self.plan.reproduce.folder, allowed)
        self.seconds[run.arm.name].append(done["seconds"])
        return True

    def _record(self, run: Run, seconds: float) -> None:
        self.seconds[run.arm.name].append(seconds)
        if rank() == 0:
            settings = given_settings(self.configuration(run))
            write_json(run.folder / COMPLETE, {"seconds": seconds, "settings": settings})

    def _print_progress(self, run: Run, left: Sequence[Run]) -> None:
        mean = fmean(second for seconds in self.seconds.values() for second in seconds)
        seconds = sum(fmean(self.seconds[other.arm.name] or [mean]) for other in left)
        scores = "  ".join(
            f"{line['set']} {name} {value['mean']:.3f}"
            for line in run.results(last=True)
            for name, value in list(line["metrics"].items())[:1]
        )
        logger.info("%s  left %s", scores, format_duration(seconds))
