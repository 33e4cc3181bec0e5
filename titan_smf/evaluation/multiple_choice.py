"""Multiple choice: the ending that a model finds most likely for its length.

Rows are HellaSwag's: {"ctx": text, "endings": [text, ...], "label": index}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan_smf.data.fields import RowError, text_of, texts_of
from titan_smf.evaluation.likelihood import RowTask
from titan_smf.evaluation.metrics import estimate
from titan_smf.evaluation.task import Outcome


@dataclass(frozen=True)
class Choice:
    """A beginning, its possible endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int


class ChoiceTask(RowTask[Choice]):
    """Choices with each ending as a continuation of its prompt.

    Endings are compared by their log likelihood divided by their number of characters, so that the
    numbers of models with different tokenizers can be compared.
    """

    form = 'a choice is {"ctx": text, "endings": [text, ...], "label": index of the right one}'
    measured = {"likelihood_per": "character"}  # noqa: RUF012  a ClassVar of the base

    def read(self, row: dict[str, Any]) -> tuple[Choice, list[dict[str, str]]]:
        for key in ("ctx", "endings", "label"):
            if key not in row:
                raise RowError(f"has no {key!r}, but {', '.join(row)}")
        endings = texts_of(row["endings"], "endings")
        label = row["label"]  # HellaSwag writes it as text
        if str(label) not in map(str, range(len(endings))):
            raise RowError(f"label is {label!r}, not an index of its {len(endings)} endings")
        choice = Choice(text_of(row["ctx"], "ctx"), endings, int(label))
        return choice, [{"ending": ending} for ending in endings]

    def outcome(self, sums: Sequence[float], resamples: int) -> Outcome:
        sizes = (len(answer.strip()) for answer in self.answers)
        each = iter([nll / size for nll, size in zip(sums, sizes, strict=True)])
        predictions = []
        for choice in self.items:
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
