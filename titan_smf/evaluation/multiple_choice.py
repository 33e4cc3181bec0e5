"""Multiple choice: the ending that a model finds most likely for its length.

Rows are HellaSwag's: {"ctx": text, "endings": [text, ...], "label": index}.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from titan_smf.data.fields import RowError, text_of, texts_of
from titan_smf.data.rows import Row
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import DataError
from titan_smf.evaluation.likelihood import Continuation, continuation, negative_log_likelihoods
from titan_smf.evaluation.metrics import estimate
from titan_smf.evaluation.rounds import EvaluatedModel
from titan_smf.evaluation.task import Outcome, Task, check_lengths
from titan_smf.evaluation.templates import Template

FORM = 'a choice is {"ctx": text, "endings": [text, ...], "label": index of the right one}'


@dataclass(frozen=True)
class Choice:
    """A beginning, its possible endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int


class ChoiceTask(Task):
    """Choices with each ending as a continuation of its prompt.

    Endings are compared by their log likelihood divided by their number of characters, so that the
    numbers of models with different tokenizers can be compared.

    Raises:
        DataError: a row is no choice.
        ConfigError: a prompt with its ending is too long.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Row],
        template: Template,
        shots: int,
        tokenizer: Tokenizer,
        max_seq_len: int,
    ) -> None:
        self.settings = {"likelihood_per": "character"}
        self.choices: list[Choice] = []
        self.texts: list[Continuation] = []
        self.sizes: list[int] = []
        for row in rows:
            try:
                choice = _choice(row)
                fields = {key: value for key, value in row.values.items() if isinstance(value, str)}
                prompt = template.prompt_of(fields, shots)
                answers = [template.answer_of({"ending": ending}) for ending in choice.endings]
                for place, answer in enumerate(answers):
                    if not answer.strip():
                        raise RowError(f"endings[{place}] is nothing but marks that are left out")
            except (RowError, DataError) as error:
                raise DataError(f"{row.where}: {error}; {FORM}") from error
            self.choices.append(choice)
            self.texts += [continuation(tokenizer, prompt, answer) for answer in answers]
            self.sizes += [len(answer.strip()) for answer in answers]
        lengths = (len(text.tokens) - 1 for text in self.texts)
        check_lengths(lengths, max_seq_len, f"a choice of {name}")

    @property
    def count(self) -> int:
        return len(self.choices)

    def run(
        self, model: EvaluatedModel, batch_size: int, resamples: int, what: str
    ) -> Outcome | None:
        sums = negative_log_likelihoods(model, self.texts, batch_size, what)
        if sums is None:
            return None
        each = iter(nll / size for nll, size in zip(sums, self.sizes, strict=True))
        predictions = []
        for choice in self.choices:
            values = [next(each) for _ in choice.endings]
            chosen = min(range(len(values)), key=values.__getitem__)
            predictions.append(
                {
                    "context": choice.context,
                    "prediction": choice.endings[chosen],
                    "answer": choice.endings[choice.label],
                    "right": chosen == choice.label,
                    "nll_per_character": [round(value, 4) for value in values],
                }
            )
        right = [float(prediction["right"]) for prediction in predictions]  # type: ignore[arg-type]
        return Outcome({"accuracy": estimate(right, resamples=resamples)}, predictions)


def _choice(row: Row) -> Choice:
    for key in ("ctx", "endings", "label"):
        if key not in row.values:
            raise RowError(f"has no {key!r}, but {', '.join(row.values)}")
    endings = texts_of(row.values["endings"], "endings")
    label = row.values["label"]  # HellaSwag writes it as text
    if str(label) not in map(str, range(len(endings))):
        raise RowError(f"label is {label!r}, not an index of its {len(endings)} endings")
    return Choice(text_of(row.values["ctx"], "ctx"), endings, int(label))
