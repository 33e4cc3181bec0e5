"""How likely a model finds the end of a text, given its beginning: answers, and running text."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F

from titan_smf.data.fields import RowError, text_of
from titan_smf.data.packing import num_windows, read_windows
from titan_smf.data.rows import Row
from titan_smf.data.token_shards import TokenShards
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import DataError
from titan_smf.evaluation.metrics import estimate
from titan_smf.evaluation.rounds import EvaluatedModel
from titan_smf.evaluation.task import Outcome, Task, check_lengths, prompt_tokens
from titan_smf.evaluation.templates import Template

MOST_WINDOWS = 1000
"""Sequences of a token set that are read where no limit is given."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Continuation:
    """Tokens of which those from `start` on are predicted, each given all before it."""

    tokens: list[int]
    start: int
    """From 1 to below the number of tokens."""

    @property
    def num_predicted(self) -> int:
        """The number of tokens whose likelihood counts."""
        return len(self.tokens) - self.start


def continuation(tokenizer: Tokenizer, prompt: str, answer: str) -> Continuation:
    """The tokens of a prompt and, apart from it, of the answer that follows."""
    tokens = prompt_tokens(tokenizer, prompt)
    return Continuation(tokens + tokenizer.encode(answer), len(tokens))


def negative_log_likelihoods(
    model: EvaluatedModel, texts: Sequence[Continuation], batch_size: int, what: str = "texts"
) -> list[float] | None:
    """Of each continuation, in nats, summed over its predicted tokens; None if asked to stop.

    It does not depend on the other texts, nor on the number of ranks, but for rounding.
    Collective, inside `model.open()`.
    """

    def work(batch: list[int]) -> list[float]:
        rows = [texts[item].tokens for item in batch] or [[model.tokenizer.pad_id] * 2]
        tokens = model.padded(rows)
        logits = model.logits(tokens[:, :-1])
        sums = []
        for row, item in enumerate(batch):  # one by one: a wide copy of all logits is large
            first, end = texts[item].start, len(texts[item].tokens)
            predicted = logits[row, first - 1 : end - 1]
            wide = torch.promote_types(predicted.dtype, torch.float32)
            sums.append(
                F.cross_entropy(predicted.to(wide), tokens[row, first:end], reduction="sum")
            )
        return torch.stack(sums).tolist() if sums else []

    lengths = [len(text.tokens) for text in texts]
    return model.in_rounds(work, lengths, batch_size, what)


class LikelihoodTask(Task):
    """A set whose numbers follow from the likelihoods of continuations."""

    texts: list[Continuation]

    def run(
        self, model: EvaluatedModel, batch_size: int, resamples: int, what: str
    ) -> Outcome | None:
        sums = negative_log_likelihoods(model, self.texts, batch_size, what)
        return None if sums is None else self.outcome(sums, resamples)

    @abstractmethod
    def outcome(self, sums: Sequence[float], resamples: int) -> Outcome:
        """What follows from the negative log likelihoods of `texts`."""


class RowTask(LikelihoodTask, Generic[Item]):
    """Rows of which each is a prompt with one or more possible answers.

    Raises:
        DataError: a row is not of the form.
        ConfigError: a prompt with its answer is too long.
    """

    form: str
    """What a row should be, for messages."""
    measured: ClassVar[dict[str, str]] = {}
    """How the metrics are computed, for the record."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        template: Template,
        shots: int,
        tokenizer: Tokenizer,
        max_seq_len: int,
    ) -> None:
        self.settings = dict(self.measured)
        self.items: list[Item] = []
        self.answers: list[str] = []
        """Of all items, one after another, as `texts` are."""
        self.texts = []
        for row in rows:
            fields = {key: value for key, value in row.values.items() if isinstance(value, str)}
            try:
                item, endings = self.read(row.values)
                prompt = template.prompt_of(fields, shots)
                answers = [template.answer_of(fields | ending) for ending in endings]
                for number, answer in enumerate(answers, start=1):
                    if not answer.strip():
                        raise RowError(f"answer {number} is nothing but marks that are left out")
            except (RowError, DataError) as error:
                raise DataError(f"{row.where}: {error}; {self.form}") from error
            self.items.append(item)
            self.answers += answers
            self.texts += [continuation(tokenizer, prompt, answer) for answer in answers]
        lengths = (len(text.tokens) - 1 for text in self.texts)
        check_lengths(lengths, max_seq_len, f"an item of {name} with its answer")

    @property
    def count(self) -> int:
        return len(self.items)

    @abstractmethod
    def read(self, row: dict[str, Any]) -> tuple[Item, list[dict[str, str]]]:
        """The item, and for each of its answers the fields that the template has beside the row's.

        Raises:
            RowError: the row is no item.
        """


class AnswerTask(RowTask[dict[str, str]]):
    """Questions with their answers as continuations; GSM8K's rows: {"question", "answer"}.

    The metric `nll` is over all tokens of all answers, `nll_per_answer` a mean of their sums.
    """

    form = 'an item is {"question": text, "answer": text}'

    def read(self, row: dict[str, Any]) -> tuple[dict[str, str], list[dict[str, str]]]:
        return {key: text_of(row.get(key), key) for key in ("question", "answer")}, [{}]

    def outcome(self, sums: Sequence[float], resamples: int) -> Outcome:
        sizes = [text.num_predicted for text in self.texts]
        predictions = [
            {**item, "nll": round(nll / size, 4), "tokens": size}
            for item, nll, size in zip(self.items, sums, sizes, strict=True)
        ]
        metrics = {
            "nll": estimate(sums, sizes, resamples),
            "nll_per_answer": estimate(sums, resamples=resamples),
        }
        return Outcome(metrics, predictions)


class TokenTask(LikelihoodTask):
    """Sequences spread evenly over token shards, as the validation loss takes them.

    Args:
        limit: number of sequences; 0 for all, up to `MOST_WINDOWS`.

    Raises:
        DataError: the shards hold less than one sequence.
    """

    def __init__(self, shards: TokenShards, seq_len: int, limit: int) -> None:
        self.settings = {"seq_len": seq_len}
        available = num_windows(shards.num_tokens, seq_len)
        if not available:
            raise DataError(
                f"{shards.path}: its {shards.num_tokens} tokens are fewer than one sequence of "
                f"{seq_len + 1}: give more text or a shorter evaluation.seq_len"
            )
        wanted = min(limit or MOST_WINDOWS, available)
        windows = [number * available // wanted for number in range(wanted)]
        self.texts = [
            Continuation(tokens, 1) for tokens in read_windows(shards, windows, seq_len).tolist()
        ]

    @property
    def count(self) -> int:
        return len(self.texts)

    def outcome(self, sums: Sequence[float], resamples: int) -> Outcome:
        sizes = [text.num_predicted for text in self.texts]
        return Outcome({"loss": estimate(sums, sizes, resamples)}, [])
