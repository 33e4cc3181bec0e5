"""Which tokens of a text belong to the names that its record is about, as far as these are known.

Known are the answers of a fact and, in the synthetic world, its subject; of a document of that
world the subjects and answers of the facts that it states. Documents from a file name nothing.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence

from titan_smf.config.sections import Stream
from titan_smf.data.tokenizer import Tokenizer
from titan_smf.streams.records import Document, Fact, Record
from titan_smf.world.source import SYNTHETIC_PREFIX, parse_world


def names_in(stream: Stream) -> Callable[[Record], list[str]]:
    """Return a function that gives the known names of a record of this stream."""
    facts = parse_world(stream.path).world.facts if stream.path.startswith(SYNTHETIC_PREFIX) else []
    subjects = {fact.id: fact.subject for fact in facts}
    all_names = {n for fact in facts if fact.role == "new" for n in (fact.subject, fact.answer)}

    def names(record: Record) -> list[str]:
        if isinstance(record, Fact):
            subject = subjects.get(record.id)
            return [*record.answers, subject] if subject else list(record.answers)
        assert isinstance(record, Document)
        chunk = record.chunk.casefold()
        return [name for name in sorted(all_names) if name.casefold() in chunk]

    return names


def entity_tokens(
    text: str, tokens: Sequence[int], tokenizer: Tokenizer, names: Iterable[str]
) -> list[bool]:
    """Return for each token whether it holds part of a name, found as whole words in any case.

    Args:
        tokens: of `text`, with or without begin and end tokens, maybe cut at the end.
    """
    inside = [False] * (len(text) + 1)  # for each character
    for name in names:
        for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE):
            inside[found.start() : found.end()] = [True] * (found.end() - found.start())
    inside_bytes = [
        is_inside
        for character, is_inside in zip(text, inside, strict=False)
        for _ in character.encode()
    ]
    flags, start = [], 0
    for content in _contents(tokens, tokenizer):
        flags.append(any(inside_bytes[start : start + len(content)]))
        start += len(content)
    return flags


def pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the characters of each token; one that several tokens make goes to the last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(content) for content in _contents(tokens, tokenizer)]


def _contents(tokens: Sequence[int], tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token; none of begin and end tokens."""
    marks = (tokenizer.bos_id, tokenizer.eos_id)
    return [b"" if token in marks else tokenizer.token_bytes(token) for token in tokens]
