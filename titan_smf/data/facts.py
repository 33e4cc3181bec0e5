"""Facts to be learned, one a step: many statements of it, and a question that shows what stuck."""

from dataclasses import dataclass

from titan_smf.data.records import Record


@dataclass(frozen=True)
class Fact(Record):
    """A line of a fact stream, and of a question set."""

    statements: tuple[str, ...]
    """The fact in different words; each stands alone."""
    question: str
    """Asks for the fact; never trained on."""
    answers: tuple[str, ...]
    """Each is right by itself."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.statements
