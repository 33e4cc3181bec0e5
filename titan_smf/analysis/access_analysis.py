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

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_smf.analysis.access_pictures import draw_all
from titan_smf.analysis.access_report import ANALYSIS_FILE
from titan_smf.analysis.coloured_texts import coloured_texts
from titan_smf.analysis.entity_spans import entity_tokens, names_in, pieces
from titan_smf.analysis.measures import (
    NOWHERE,
    RANKINGS,
    ReadText,
    auc,
    core_set,
    measures,
    places,
    reads_of,
    summarise,
    without_begin,
)
from titan_smf.evaluation.templates import load_template
from titan_smf.model.llama import SlotLookup
from titan_smf.runtime import is_first_rank
from titan_smf.sparse.accesses import OwnedSlots, touched_slots
from titan_smf.sparse.ranking import Ranking, SelectionRule, select
from titan_smf.streams.records import Document, Fact, Record, open_stream
from titan_smf.training.background import load_background
from titan_smf.training.trainer import Trainer

FRAGMENT_FILE = "access_analysis.html"
EXAMPLES = 4
"""Records whose tokens are shown, spread evenly over those analysed."""
TEXTS_OF_EXAMPLE = 3


def analyse_accesses(trainer: Trainer) -> bool:
    """Analyse what the trainer's configuration names and write the files; True. Collective."""
    path = trainer.load_weights(trainer.job_config.checkpoint.initial_load_path or "")
    analysis = AccessAnalysis(trainer).run(str(path))
    if is_first_rank():
        write_analysis(analysis, trainer.folder)
    dist.barrier()
    return True


def write_analysis(analysis: dict[str, Any], folder: Path) -> None:
    """Write the files of an analysis.

    access_analysis.json    everything
    access_analysis.html    texts whose tokens are coloured by the slots that they read
    access_coverage.png     how much of core set and question each ranking finds, by slots selected
    access_core.png         sizes of the core sets
    access_sequence.png     reads of core and of selected slots along texts
    """
    content = json.dumps(analysis, separators=(",", ":"), allow_nan=False)
    (folder / ANALYSIS_FILE).write_text(content + "\n")
    (folder / FRAGMENT_FILE).write_text(coloured_texts(analysis), encoding="ascii")
    for name, png in draw_all(analysis).items():
        (folder / f"{name}.png").write_bytes(png)


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
        self._rows = config.training.local_batch_size  # texts in one forward pass of a rank
        rows = trainer.gradient_accumulation_steps * self._rows * dist.get_world_size()
        self.batch_size = rows - config.replay.num_rows(rows)
        """Texts of a step. Rows of replay have no part in the choice of slots."""
        memory = trainer.model.model_args.memory
        self.tables = OwnedSlots(memory.num_slots, 0, memory.num_slots, memory.num_tables)
        """Every rank ranks the slots of its own records, so it needs the counts of all slots."""
        cpu, idf = torch.device("cpu"), config.selection.idf_path
        self.background = load_background(idf, trainer.model, trainer.tokenizer, cpu, self.tables)

    def run(self, checkpoint: str) -> dict[str, Any]:
        """Return the content of `access_analysis.json`. Collective."""
        settings = self.config
        passes = max(math.ceil(len(self._texts(record)) / self._rows) for record in self.records)

        def results_of(numbers: list[int]) -> list[dict[str, Any]]:
            """Analyse one record, or none beside the ranks that have one."""
            texts = [text for number in numbers for text in self._texts(self.records[number])]
            read = self._read(texts, passes)
            return [self._result(number, read) for number in numbers]

        model, lengths = self.trainer.evaluation.model, [1] * len(self.records)
        results = model.map_batches(results_of, lengths, batch_size=1, what="analysis of records")
        assert results is not None, "nobody asks an analysis to stop"
        examples = [example for r in results if (example := r.pop("example"))]
        memory = self.trainer.model.model_args.memory
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
            "summary": summarise(results),
            "records": results,
            "examples": examples,
        }

    def _texts(self, record: Record) -> list[str]:
        """Return the question, or a document's chunk, then the texts of the record's first step."""
        if isinstance(record, Fact):
            question = self.template.prompt_of({"question": record.question})
        else:
            assert isinstance(record, Document)
            question = record.chunk
        return [question, *record.texts[: self.batch_size]]

    def _read(self, texts: Sequence[str], passes: int) -> list[ReadText]:
        """Return what the tokens of the texts read, in `passes` forward passes. Collective."""
        tokenizer, seq_len = self.trainer.tokenizer, self.config.training.seq_len
        # The last token of a sequence is learned but not read: of a step's texts the end token.
        sequences = [tokenizer.encode(text, bos=True)[:seq_len] for text in texts]
        read: list[ReadText] = []
        for first in range(0, passes * self._rows, self._rows):
            rows = sequences[first : first + self._rows]
            inputs = self.trainer.evaluation.model.padded(rows or [[tokenizer.pad_id]])
            layers: list[SlotLookup] = []
            self.trainer.accessed_rows({"input": inputs}, torch.zeros_like(inputs), layers.append)
            slots = self.tables.ids_by_layer([layer.slots for layer in layers])
            weights = [layer.weights.double() for layer in layers]
            both = [
                torch.cat([part.view(*inputs.shape, -1) for part in parts], -1).cpu()
                for parts in (slots, weights)
            ]
            for row, tokens in enumerate(rows):
                read.append(ReadText(tokens, *(whole[row, : len(tokens)] for whole in both)))
        return read

    def _result(self, number: int, read: Sequence[ReadText]) -> dict[str, Any]:
        """Return all measures of a record; its `example` is None unless it is to be shown."""
        record = self.records[number]
        # Texts repeat where there are fewer than rows in the batch, as in `StreamLoader`.
        texts = read[1:]
        in_batch = [texts[row % len(record.texts)].slots for row in range(self.batch_size)]
        orders = {ranking: self.order(in_batch, ranking, number + 1) for ranking in RANKINGS}
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
        sizes = dict.fromkeys(RANKINGS, self.sizes) | {"all": [NOWHERE] * len(self.sizes)}
        step = max(1, len(self.records) // EXAMPLES)
        shown = number % step == 0 and number // step < EXAMPLES
        return {
            "number": number,
            "id": record.id,
            "core": len(core),
            "core_common": int((2 * df.long() > self.background.documents).sum()),
            "touched": len(orders["all"]),
            "core_weight": float(on_core / question.weights.sum()),
            "core_auc": auc(reads_of(slots, core), is_entity),
            "rankings": {
                ranking: measures(order, sizes[ranking], core, question, slots, is_entity)
                for ranking, order in orders.items()
            },
            "example": self._example(record, read, entities, core, orders) if shown else None,
        }

    def order(self, texts: Sequence[Tensor], ranking: Ranking, step: int) -> Tensor:
        """Return the slots that the step would select, best first, up to the largest size."""
        seed = self.config.debug.seed or 0
        rule = SelectionRule(ranking, self.sizes[-1], seed, self.background)
        return select(touched_slots(texts), rule, step).ids

    def _example(
        self,
        record: Record,
        read: Sequence[ReadText],
        entities: Sequence[Sequence[bool]],
        core: Tensor,
        orders: dict[Ranking, Tensor],
    ) -> dict[str, Any]:
        """Return `[characters, reads of core, of selected slots, is a name]` of tokens, by text."""
        ranking, top_t = self.config.selection.ranking, self.config.selection.top_t
        selected = orders[ranking] if ranking == "all" else orders[ranking][:top_t]
        texts = []
        for one, flags in list(zip(read, entities, strict=True))[: 1 + TEXTS_OF_EXAMPLE]:
            counts = [reads_of(one.slots, ids).tolist() for ids in (core, selected)]
            shown = pieces(one.tokens, self.trainer.tokenizer)
            texts.append([list(token) for token in zip(shown, *counts, flags, strict=True)])
        return {"id": record.id, "question": texts[0], "texts": texts[1:]}
