"""Documents to be learned, one chunk a step: the chunk is read as many rewrites of it."""

from dataclasses import dataclass

from titan_smf.data.records import Record


@dataclass(frozen=True)
class Document(Record):
    """A line of a document stream."""

    chunk: str
    """A part of a document as it is. Not trained on: to do so, add it to the rewrites."""
    rewrites: tuple[str, ...]
    """What the chunk says, in different words."""

    @property
    def texts(self) -> tuple[str, ...]:
        return self.rewrites
