"""Which slots hold a fact, and how well each ranking finds them.

The *core set* of a record is what all its texts and its question read. At each step of sparse
finetuning a ranking selects t of the slots that the texts read; here it selects without learning,
and is measured by

    recall    share of the core set that is selected
    weight    share of the softmax weight that the question puts on slots, on selected ones
    AUC       how well a token's number of reads of selected slots tells tokens of names (subject,
              answer) from other tokens; the same for reads of the core set

after the analysis in Continual Learning via Sparse Memory Finetuning (arXiv 2510.15103). The
question is read as evaluation asks it, in its template without examples (`Q: ...\\nA:`): the answer
is produced where the template ends, so what is read there counts. A document has no question; its
chunk, which is not trained on either, stands in for it. A begin token reads the same slots in every
text: it counts where a step chooses its slots, as it does in training, and is left out of
everything else.

    records --every rank its own--> what each token reads --> one result a record --rank 0--> files

The model is split over the ranks, so all of them make the same number of forward passes.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.analysis.access_report import write_report
from titan_smf.analysis.entity_spans import entity_tokens, names_in, pieces
from titan_smf.analysis.token_accesses import (
    NOWHERE,
    ReadText,
    auc,
    core_set,
    places,
    without_begin,
)
from titan_smf.config.job import JobConfig
from titan_smf.config.sections import EvaluationSet
from titan_smf.errors import ConfigError
from titan_smf.evaluation.metrics import estimate
from titan_smf.evaluation.sets import complete_sets
from titan_smf.evaluation.templates import load_template
from titan_smf.model.llama import Addressed
from titan_smf.runtime import format_duration
from titan_smf.sparse.accesses import OwnedSlots, touched_slots
from titan_smf.sparse.ranking import Ranking, SelectionRule, select
from titan_smf.streams.loader import open_stream
from titan_smf.streams.records import Document, Fact, Record
from titan_smf.training.background import load_background
from titan_smf.training.trainer import Trainer

RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
MEASURES = ("recall", "weight", "auc")
EXAMPLES = 4
"""Records whose tokens are shown, spread evenly over those analysed."""
TEXTS_OF_EXAMPLE = 3
SECONDS_BETWEEN_LINES = 5

logger = logging.getLogger("titan_smf")


def analysis_config(config: JobConfig) -> JobConfig:
    """The configuration of a finetuning run, changed so that it trains, asks and saves nothing.

    Of the evaluation there stays `evaluation.template`, in which the stream's questions are asked.

    Raises:
        ConfigError: there is no stream, no checkpoint, no background, or no memory.
    """
    for key, got, allowed in (
        ("stream.path", config.stream.path, "the facts or documents to analyse"),
        (
            "checkpoint.initial_load_path",
            config.checkpoint.initial_load_path,
            "the run, or one of its checkpoints, to analyse",
        ),
        (
            "selection.idf_path",
            config.selection.idf_path,
            "the file of tools/compute_idf.py for this model: tfidf and kl are compared, too",
        ),
        (
            "memory.layers",
            config.memory.layers is None or config.memory.layers,
            "at least one layer: a dense model has no slots",
        ),
    ):
        if not got:
            raise ConfigError(key, got, allowed, config.origin(key))
    default = JobConfig()
    return config.changed(
        {
            "finetune.method": "sparse_memory",
            "optimizer": default.optimizer,
            "evaluation": default.evaluation,
            "evaluation.template": question_template(config),
            "checkpoint.enable": False,
            "validation.enable": False,
            "metrics.enable_tensorboard": False,
            "lr_scheduler.warmup_steps": 0,
            "compile": default.compile,
        }
    )


def question_template(config: JobConfig) -> str:
    """The name of the template in which evaluation asks the stream's questions.

    That of the first set of questions with the role of a target; without one, that of a set of the
    stream's own questions that names none.
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


def analyse_accesses(trainer: Trainer) -> bool:
    """Analyse what the trainer's configuration names and write the files; True. Collective."""
    write_analysis(trainer)
    return True


def write_analysis(trainer: Trainer) -> dict[str, Any] | None:
    """Analyse what the trainer's configuration names and write the files. Collective.

    Returns:
        the analysis, as `access_analysis.json` has it, on rank 0; None on the others.
    """
    path = trainer.load_weights(trainer.job_config.checkpoint.initial_load_path or "")
    analysis = AccessAnalysis(trainer).run(str(path))
    if analysis is not None:
        write_report(analysis, Path(trainer.job_config.job.dump_folder))
    dist.barrier()
    return analysis


class AccessAnalysis:
    """One pass over the records of a stream on all ranks."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.job_config
        self.trainer = trainer
        self.config = config
        stream = open_stream(config.stream.path, config.stream.kind)
        self.records = stream[: config.analysis.limit]
        self.names = names_in(config.stream)
        self.template = load_template(config.evaluation.template).with_shots(0)
        self.sizes = sorted({*config.analysis.sizes, config.selection.top_t})
        local = config.training.local_batch_size
        steps = trainer.gradient_accumulation_steps
        rows = steps * local * dist.get_world_size()
        self.batch_size = rows - config.replay.num_rows(rows)
        """Texts of a step. Rows of replay have no part in the choice of slots."""
        memory = trainer.model.model_args.memory
        self.tables = OwnedSlots(memory.num_slots, 0, memory.num_slots, memory.num_tables)
        """Every rank ranks the slots of its own records, so it needs the counts of all slots."""
        self.background = load_background(
            config.selection.idf_path,
            trainer.model,
            trainer.tokenizer,
            torch.device("cpu"),
            self.tables,
        )

    def run(self, checkpoint: str) -> dict[str, Any] | None:
        """The analysis, as `access_analysis.json` has it, on rank 0; None on the others."""
        trainer, settings = self.trainer, self.config
        mine = list(self._results())
        gathered: list[Any] = [None] * dist.get_world_size()
        is_first = dist.get_rank() == 0
        dist.gather_object(mine, gathered if is_first else None)
        if not is_first:
            return None
        results = sorted((r for part in gathered for r in part), key=lambda r: r["number"])
        examples = [example for r in results if (example := r.pop("example"))]
        memory = trainer.model.model_args.memory
        return {
            "checkpoint": checkpoint,
            "stream": settings.stream.path,
            "kind": settings.stream.kind,
            "template": settings.evaluation.template,
            "idf": settings.selection.idf_path,
            "background_documents": self.background.documents,
            "slots": len(self.tables),
            "accesses_per_token": len(memory.layers) * memory.heads * memory.k,
            "batch_size": self.batch_size,
            "sizes": self.sizes,
            "ranking": settings.selection.ranking,
            "top_t": settings.selection.top_t,
            "summary": summarise(results, self.sizes),
            "records": results,
            "examples": examples,
        }

    def _results(self) -> Iterator[dict[str, Any]]:
        """One result for each record of this rank."""
        rank, ranks, total = dist.get_rank(), dist.get_world_size(), len(self.records)
        begin = last_line = time.perf_counter()
        for first in range(0, total, ranks):
            sharing = self.records[first : first + ranks]
            passes = max(math.ceil(len(self._texts(r)) / self._rows) for r in sharing)
            record = sharing[rank] if rank < len(sharing) else None
            read = self._read(self._texts(record) if record else [], passes)
            if record is not None:
                yield self._result(first + rank, record, read)
            now, done = time.perf_counter(), first + len(sharing)
            if now - last_line > SECONDS_BETWEEN_LINES or first == 0 or done == total:
                last_line = now
                left = format_duration((total - done) * (now - begin) / done)
                logger.info("record %d/%d  left %s", done, total, left)

    @property
    def _rows(self) -> int:
        """Texts in one forward pass of a rank."""
        return self.config.training.local_batch_size

    def _texts(self, record: Record) -> list[str]:
        """The question, or what stands in for it, then the texts of the record's first step."""
        return [self._question(record), *record.texts[: self.batch_size]]

    def _question(self, record: Record) -> str:
        if isinstance(record, Fact):
            return self.template.prompt_of({"question": record.question})
        assert isinstance(record, Document)
        return record.chunk

    def _read(self, texts: Sequence[str], passes: int) -> list[ReadText]:
        """What the tokens of the texts read, in so many forward passes. Collective."""
        tokenizer, seq_len = self.trainer.tokenizer, self.config.training.seq_len
        # The last token of a sequence is learned but not read: of a step's texts the end token.
        sequences = [tokenizer.encode(text, bos=True)[:seq_len] for text in texts]
        read: list[ReadText] = []
        for number in range(passes):
            rows = sequences[number * self._rows : (number + 1) * self._rows]
            length = max(map(len, rows), default=1)
            inputs = torch.full((max(len(rows), 1), length), tokenizer.pad_id)
            for row, tokens in enumerate(rows):
                inputs[row, : len(tokens)] = torch.tensor(tokens)
            layers: list[Addressed] = []
            self.trainer.addresses({"input": inputs}, torch.zeros_like(inputs), layers.append)
            slots, weights = self._joined(layers, inputs.shape)
            for row, tokens in enumerate(rows):
                read.append(
                    ReadText(tokens, slots[row, : len(tokens)], weights[row, : len(tokens)])
                )
        return read

    def _joined(self, layers: Sequence[Addressed], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Slot ids and weights, (B, S, A), of all memory layers, on the CPU."""
        slots = [
            self.tables.ids(layer.slots, number % self.tables.num_tables).view(*shape, -1).cpu()
            for number, layer in enumerate(layers)
        ]
        weights = [layer.weights.double().view(*shape, -1).cpu() for layer in layers]
        return torch.cat(slots, -1), torch.cat(weights, -1)

    def _result(self, number: int, record: Record, read: Sequence[ReadText]) -> dict[str, Any]:
        """All that is said of a record; `example` is None unless its tokens are to be shown."""
        # Texts repeat where there are fewer than rows in the batch, as in `StreamLoader`.
        texts = read[1:]
        in_batch = [texts[row % len(record.texts)].slots for row in range(self.batch_size)]
        seed = self.config.debug.seed or 0
        orders = {ranking: self.order(in_batch, ranking, number + 1, seed) for ranking in RANKINGS}

        tokenizer = self.trainer.tokenizer
        read = [without_begin(one, tokenizer.bos_id) for one in read]
        question, *texts = read
        names = self.names(record)
        entities = [
            entity_tokens(text, one.tokens, tokenizer, names)
            for text, one in zip(self._texts(record), read, strict=True)
        ]
        core = core_set([one.slots for one in read])
        slots = torch.cat([one.slots for one in texts])
        is_entity = torch.tensor([flag for flags in entities[1:] for flag in flags])
        on_core = question.weights[places(question.slots, core) != NOWHERE].sum()
        df = self.background.df[self.background.owned.positions(core)]
        step = max(1, len(self.records) // EXAMPLES)
        shown = number % step == 0 and number // step < EXAMPLES
        return {
            "number": number,
            "id": record.id,
            "core": len(core),
            "core_common": int((2 * df.long() > self.background.documents).sum()),
            "touched": len(orders["all"]),
            "core_weight": float(on_core / question.weights.sum()),
            "core_auc": auc((places(slots, core) != NOWHERE).sum(1), is_entity),
            "rankings": {
                ranking: measures(order, self._sizes_of(ranking), core, question, slots, is_entity)
                for ranking, order in orders.items()
            },
            "example": self._example(record, read, entities, core, orders) if shown else None,
        }

    def order(self, texts: Sequence[Tensor], ranking: Ranking, step: int, seed: int) -> Tensor:
        """The slots that the step would select, best first, as many as are looked at."""
        rule = SelectionRule(ranking, self.sizes[-1], seed, self.background)
        return select(touched_slots(texts), rule, step).ids

    def _sizes_of(self, ranking: Ranking) -> list[int]:
        """All accessed slots are as many as they are."""
        return [NOWHERE] * len(self.sizes) if ranking == "all" else self.sizes

    def _example(
        self,
        record: Record,
        read: Sequence[ReadText],
        entities: Sequence[Sequence[bool]],
        core: Tensor,
        orders: dict[Ranking, Tensor],
    ) -> dict[str, Any]:
        """For each token of some texts: its characters, reads of core and of selected slots, and
        whether it belongs to a name."""
        ranking = self.config.selection.ranking
        selected = orders[ranking]
        if ranking != "all":
            selected = selected[: self.config.selection.top_t]
        texts = []
        for one, flags in list(zip(read, entities, strict=True))[: 1 + TEXTS_OF_EXAMPLE]:
            counts = [
                (places(one.slots, ids) != NOWHERE).sum(1).tolist() for ids in (core, selected)
            ]
            shown = pieces(one.tokens, self.trainer.tokenizer)
            texts.append([list(token) for token in zip(shown, *counts, flags, strict=True)])
        return {"id": record.id, "question": texts[0], "texts": texts[1:]}


def measures(
    order: Tensor,
    sizes: Sequence[int],
    core: Tensor,
    question: ReadText,
    slots: Tensor,
    is_entity: Tensor,
) -> dict[str, list[float | None]]:
    """How well the first slots of an order serve, for each number of them.

    Args:
        order: slots, best first.
        core: the slots to find; none of them is found in an empty set, recall is then None.
        slots, is_entity: (T, A), and (T,) bool, of the texts' tokens.
    """
    of_core, of_question = places(core, order), places(question.slots, order)
    of_tokens = places(slots, order)
    whole = question.weights.sum()
    return {
        "recall": [int((of_core < t).sum()) / len(core) if len(core) else None for t in sizes],
        "weight": [float(question.weights[of_question < t].sum() / whole) for t in sizes],
        "auc": [auc((of_tokens < t).sum(1), is_entity) for t in sizes],
    }


def summarise(results: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """Means over records, each `[mean, low, high]` with its 95% bootstrap interval, or None where
    no record has the number; and quantiles of the core set's size."""
    core = [result["core"] for result in results]
    quantiles = np.quantile(core, [0, 0.1, 0.5, 0.9, 1]).tolist()
    return {
        "core": _mean(core),
        "core_quantiles": dict(zip(("min", "10%", "50%", "90%", "max"), quantiles, strict=True)),
        "touched": _mean([result["touched"] for result in results]),
        **{
            name: _mean([result[name] for result in results])
            for name in ("core_weight", "core_auc")
        },
        "core_common": _mean(
            [r["core_common"] / r["core"] if r["core"] else None for r in results]
        ),
        "rankings": {
            ranking: {
                measure: [
                    _mean([result["rankings"][ranking][measure][place] for result in results])
                    for place in range(len(sizes))
                ]
                for measure in MEASURES
            }
            for ranking in RANKINGS
        },
    }


def _mean(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return list(dataclasses.astuple(estimate(known))) if known else None
