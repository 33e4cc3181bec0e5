"""The configuration of an analysis, from that of the finetuning run whose accesses it measures."""

import dataclasses

from titan_smf.config.job import JobConfig
from titan_smf.config.parsing import get
from titan_smf.config.sections import EvaluationSet
from titan_smf.errors import ConfigError
from titan_smf.evaluation.sets import complete_sets


def analysis_config(config: JobConfig) -> JobConfig:
    """Return a finetuning run's configuration, changed so that it trains and saves nothing.

    Of the evaluation only `evaluation.template` stays, in which the stream's questions are asked.

    Raises:
        ConfigError: there is no stream, no checkpoint, no background, or no memory.
    """
    needed = {
        "stream.path": "the facts or documents to analyse",
        "checkpoint.initial_load_path": "the run, or one of its checkpoints, to analyse",
        "selection.idf_path": "the file of tools/compute_idf.py for this model: tfidf and kl are "
        "compared, too",
        "memory.layers": "at least one layer: a dense model has no slots",
    }
    for key, allowed in needed.items():
        got = get(config, key)
        if got in (None, "", []) and (key, got) != ("memory.layers", None):  # None: the flavor's
            raise ConfigError(key, got, allowed, config.origin(key))
    default = JobConfig()
    return config.changed(
        {
            "finetune.method": "sparse_memory",
            "optimizer": default.optimizer,
            "evaluation": default.evaluation,
            "evaluation.template": _question_template(config),
            "checkpoint.enable": False,
            "validation.enable": False,
            "metrics.enable_tensorboard": False,
            "lr_scheduler.warmup_steps": 0,
            "compile": default.compile,
        }
    )


def _question_template(config: JobConfig) -> str:
    """Return the name of the template in which evaluation asks the stream's questions.

    That is the template of the first set of questions whose role is "target"; without one, the
    default template of the stream's own questions.
    """
    asked = [s for s in config.evaluation.sets if not isinstance(s, str) and s.role == "target"]
    own = EvaluationSet(config.stream.path, "stream", "questions")
    templates = [
        complete.template
        for one in (*asked, own)  # each by itself: two may have one name
        for complete in complete_sets(dataclasses.replace(config.evaluation, sets=[one]))
        if complete.kind == "questions"
    ]
    return templates[0]
