"""The facts of the invented world as streams and question sets."""

from collections.abc import Iterable

from titan_smf.streams.records import Document, Fact
from titan_smf.world import world as invented
from titan_smf.world.world import FIRST_UNSEEN_STATEMENT, STREAM_STATEMENTS, World


def fact_stream(
    world: World, facts: Iterable[invented.Fact], num_statements: int = STREAM_STATEMENTS
) -> list[Fact]:
    """A fact stream that states each of the facts in as many paraphrases, one fact a record.

    Paraphrases of known facts are such as the text does not have. It is also a question set: every
    record has a question and its answer.
    """
    return [
        Fact(
            id=fact.id,
            statements=tuple(
                world.statements(
                    fact, num_statements, FIRST_UNSEEN_STATEMENT if fact.role == "known" else 0
                )
            ),
            question=world.question(fact),
            answers=(fact.answer,),
        )
        for fact in facts
    ]


def document_stream(world: World, num_rewrites: int = STREAM_STATEMENTS) -> list[Document]:
    """A document stream that states every new fact in one chunk of up to seven facts."""
    return [
        Document(f"chunk-{number:04d}", chunk, tuple(rewrites))
        for number, (chunk, *rewrites) in enumerate(world.chunks(num_rewrites))
    ]
