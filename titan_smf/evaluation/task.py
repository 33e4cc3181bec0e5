"""What all kinds of sets have in common: read and tokenised once, asked any number of times."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from titan_smf.data.tokenizer import Tokenizer
from titan_smf.errors import ConfigError
from titan_smf.evaluation.metrics import Estimate
from titan_smf.evaluation.rounds import EvaluatedModel


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a set; the same on every rank."""

    metrics: dict[str, Estimate]
    predictions: list[dict[str, Any]]
    """An object for each item, to be read by a person; none for token sets."""


class Task(ABC):
    """A set that is ready to be asked."""

    settings: dict[str, Any]
    """What the numbers depend on beside the model, for the record."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of items."""

    @abstractmethod
    def run(
        self, model: EvaluatedModel, batch_size: int, resamples: int, what: str
    ) -> Outcome | None:
        """Ask for all items; None if asked to stop. Collective, inside `model.open()`.

        Args:
            resamples: of the bootstrap.
            what: name of the set, for the lines of progress.
        """


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of the beginning of a document, at least one."""
    return tokenizer.encode(prompt, bos=True) or [tokenizer.eos_id]


def check_lengths(lengths: Iterable[int], most: int, of: str) -> None:
    """Every sequence must have a place for each of its tokens.

    Raises:
        ConfigError: names the length that is needed.
    """
    longest = max(lengths)
    if longest > most:
        allowed = f"{longest} or more: {of} takes that many tokens; or fewer shots"
        raise ConfigError("evaluation.seq_len", most, allowed)
