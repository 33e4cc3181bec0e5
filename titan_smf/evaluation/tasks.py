"""The kinds of evaluation sets: read and tokenised once, scored any number of times.

QuestionTask   generated answers: F1 and exact match with the best reference answer
AnswerTask     likelihood of given answers
ChoiceTask     multiple choice by the likelihood of each ending
TokenTask      loss on running text
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from titan_smf.config.sections import EvaluationSet
from titan_smf.data.fields import RowError, text_of, texts_of
from titan_smf.data.packing import num_windows, read_windows
from titan_smf.data.rows import Row
from titan_smf.data.token_shards import TokenShards
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError, DataError
from titan_smf.evaluation.evaluated_model import EvaluatedModel
from titan_smf.evaluation.generate import generate
from titan_smf.evaluation.likelihood import Continuation, negative_log_likelihoods
from titan_smf.evaluation.metrics import Estimate, best, estimate, exact_match, f1
from titan_smf.evaluation.templates import Template
from titan_smf.streams.question_sets import Question

MOST_WINDOWS = 1000
"""Sequences of a token set that are read where no limit is given."""

Scores = tuple[dict[str, Estimate], list[dict[str, Any]]]
"""The metrics of a set by name, and an object for each item, to be read by a person (none for
text); the same on every rank."""


class Task(ABC):
    """An evaluation set, ready to be scored.

    Args:
        given: the set, with its settings complete.
        count: its number of items.
        settings: more of what the scores depend on beside the model, for the record.
    """

    def __init__(self, given: EvaluationSet, count: int, **settings: Any) -> None:
        self.given = given
        self.name = given.name
        self.count = count
        self.settings = {"path": given.path, **settings}
        if given.kind != "tokens":
            self.settings |= {"template": given.template, "shots": given.shots}

    @abstractmethod
    def score(self, model: EvaluatedModel, batch_size: int, resamples: int) -> Scores | None:
        """Score a model on all items; None if asked to stop. Collective, inside `model.open()`.

        Args:
            batch_size: items that a rank works on at once, at most.
            resamples: draws of the bootstrap.
        """


class QuestionTask(Task):
    """Questions with their prompts.

    Args:
        max_new_tokens: of an answer.
        max_seq_len: tokens that the model can read.

    Raises:
        ConfigError: a prompt is too long.
    """

    def __init__(
        self,
        given: EvaluationSet,
        questions: Sequence[Question],
        template: Template,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        max_seq_len: int,
    ) -> None:
        super().__init__(given, len(questions), max_new_tokens=max_new_tokens)
        self.questions = questions
        self.stop = template.stop
        self.max_new_tokens = max_new_tokens
        self.prompts = [
            prompt_tokens(tokenizer, template.prompt_of({"question": q.question}))
            for q in questions
        ]
        lengths = (len(prompt) + max_new_tokens for prompt in self.prompts)
        check_lengths(lengths, max_seq_len, f"a question of {self.name} with its answer")

    def score(self, model: EvaluatedModel, batch_size: int, resamples: int) -> Scores | None:
        texts = generate(model, self.prompts, self.stop, self.max_new_tokens, batch_size, self.name)
        if texts is None:
            return None
        answered = list(zip(texts, self.questions, strict=True))
        scores = {
            score.__name__: [best(score, text, question.answers) for text, question in answered]
            for score in (f1, exact_match)
        }
        predictions = [
            {
                "id": question.id,
                "question": question.question,
                "prediction": text,
                "answers": question.answers,
                **{name: round(values[item], 4) for name, values in scores.items()},
            }
            for item, (text, question) in enumerate(answered)
        ]
        metrics = {name: estimate(values, resamples=resamples) for name, values in scores.items()}
        return metrics, predictions


class LikelihoodTask(Task):
    """A set whose scores follow from the likelihoods of continuations."""

    texts: list[Continuation]

    def score(self, model: EvaluatedModel, batch_size: int, resamples: int) -> Scores | None:
        sums = negative_log_likelihoods(model, self.texts, batch_size, self.name)
        sizes = [text.num_predicted for text in self.texts]
        return None if sums is None else self.scores(sums, sizes, resamples)

    @abstractmethod
    def scores(self, sums: list[float], sizes: list[int], resamples: int) -> Scores:
        """Return what follows from the negative log likelihoods and the lengths of `texts`."""


class RowTask(LikelihoodTask):
    """Rows of which each is a prompt with one or more possible answers.

    Raises:
        DataError: a row is not of the form.
        ConfigError: a prompt with its answer is too long.
    """

    form: str
    """What a row should be, for messages."""
    more_settings: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        given: EvaluationSet,
        rows: Sequence[Row],
        template: Template,
        tokenizer: Tokenizer,
        max_seq_len: int,
    ) -> None:
        super().__init__(given, len(rows), **self.more_settings)
        self.items: list[dict[str, Any]] = []
        self.texts = []
        self.answers: list[str] = []
        """Of all items, one after another, as `texts` are."""
        for row in rows:
            fields = {key: value for key, value in row.values.items() if isinstance(value, str)}
            try:
                item, endings = self.read(row.values)
                prompt = prompt_tokens(tokenizer, template.prompt_of(fields))
                answers = [template.answer_of(fields | ending) for ending in endings]
                for number, answer in enumerate(answers, start=1):
                    if not answer.strip():
                        raise RowError(f"answer {number} is nothing but marks that are left out")
            except (RowError, DataError) as error:
                raise DataError(f"{row.where}: {error}; {self.form}") from error
            self.items.append(item)
            self.answers += answers
            self.texts += [
                Continuation(prompt + tokenizer.encode(answer), len(prompt)) for answer in answers
            ]
        lengths = (len(text.tokens) - 1 for text in self.texts)
        check_lengths(lengths, max_seq_len, f"an item of {self.name} with its answer")

    @abstractmethod
    def read(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Return the item, and for each of its answers the template's fields beside the row's.

        Raises:
            RowError: the row is no item.
        """


class AnswerTask(RowTask):
    """Questions with their answers as continuations; GSM8K's rows: {"question", "answer"}.

    The metric `nll` is over all tokens of all answers, `nll_per_answer` a mean of their sums.
    """

    form = 'an item is {"question": text, "answer": text}'

    def read(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
        return {key: text_of(row.get(key), key) for key in ("question", "answer")}, [{}]

    def scores(self, sums: list[float], sizes: list[int], resamples: int) -> Scores:
        predictions = [
            {**item, "nll": round(nll / size, 4), "tokens": size}
            for item, nll, size in zip(self.items, sums, sizes, strict=True)
        ]
        metrics = {
            "nll": estimate(sums, sizes, resamples),
            "nll_per_answer": estimate(sums, resamples=resamples),
        }
        return metrics, predictions


class ChoiceTask(RowTask):
    """Multiple choice, with each ending as a continuation of the prompt; HellaSwag's rows.

    The ending that the model finds most likely for its length is its choice. Log likelihoods are
    divided by the number of characters, so that the numbers of models with different tokenizers
    can be compared.
    """

    form = 'a choice is {"ctx": text, "endings": [text, ...], "label": index of the right one}'
    more_settings: ClassVar[dict[str, Any]] = {"likelihood_per": "character"}

    def read(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, str]]]:
        for key in ("ctx", "endings", "label"):
            if key not in row:
                raise RowError(f"has no {key!r}, but {', '.join(row)}")
        endings = texts_of(row["endings"], "endings")
        label = row["label"]  # HellaSwag writes it as text
        if str(label) not in map(str, range(len(endings))):
            raise RowError(f"label is {label!r}, not an index of its {len(endings)} endings")
        item = {"context": text_of(row["ctx"], "ctx"), "endings": endings, "label": int(label)}
        return item, [{"ending": ending} for ending in endings]

    def scores(self, sums: list[float], sizes: list[int], resamples: int) -> Scores:
        lengths = (len(answer.strip()) for answer in self.answers)
        per_character = iter([nll / n for nll, n in zip(sums, lengths, strict=True)])
        predictions, right = [], []
        for item in self.items:
            values = [next(per_character) for _ in item["endings"]]
            chosen = min(range(len(values)), key=values.__getitem__)
            right.append(float(chosen == item["label"]))
            predictions.append(
                {
                    "context": item["context"],
                    "prediction": item["endings"][chosen],
                    "answer": item["endings"][item["label"]],
                    "right": chosen == item["label"],
                    "nll_per_character": [round(value, 4) for value in values],
                }
            )
        return {"accuracy": estimate(right, resamples=resamples)}, predictions


class TokenTask(LikelihoodTask):
    """Sequences spread evenly over token shards, as the validation loss takes them.

    Raises:
        DataError: the shards hold less than one sequence.
    """

    def __init__(self, given: EvaluationSet, shards: TokenShards, seq_len: int) -> None:
        available = num_windows(shards.num_tokens, seq_len)
        if not available:
            raise DataError(
                f"{shards.path}: its {shards.num_tokens} tokens are fewer than one sequence of "
                f"{seq_len + 1}: give more text or a shorter evaluation.seq_len"
            )
        wanted = min(given.limit or MOST_WINDOWS, available)
        super().__init__(given, wanted, seq_len=seq_len)
        windows = [number * available // wanted for number in range(wanted)]
        self.texts = [
            Continuation(tokens, 1) for tokens in read_windows(shards, windows, seq_len).tolist()
        ]

    def scores(self, sums: list[float], sizes: list[int], resamples: int) -> Scores:
        return {"loss": estimate(sums, sizes, resamples)}, []


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of the beginning of a document, at least one."""
    return tokenizer.encode(prompt, bos=True) or [tokenizer.eos_id]


def check_lengths(lengths: Iterable[int], max_seq_len: int, of: str) -> None:
    """Check that the model can read sequences of these numbers of tokens.

    Raises:
        ConfigError: names the length that is needed.
    """
    longest = max(lengths)
    if longest > max_seq_len:
        allowed = f"{longest} or more: {of} takes that many tokens; or fewer shots"
        raise ConfigError("evaluation.seq_len", max_seq_len, allowed)
