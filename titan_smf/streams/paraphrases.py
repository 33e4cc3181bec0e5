"""Statements of facts and rewrites of chunks without a model, by the patterns of a TOML file.

The patterns (`patterns.toml`) are simple: statements of a fact either quote its question or turn it
into a sentence where a rule can; rewrites of a chunk only reorder its sentences. They make a stream
from any question set or text; what a language model writes teaches more. Draws are seeded: the same
input gives the same text everywhere.
"""

import functools
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from titan_smf.streams.chunks import split_sentences
from titan_smf.world.names import Draws

PATTERNS = Path(__file__).with_name("patterns.toml")
MIN_SENTENCE_SHARE = 0.5
"""Share of a chunk's sentences that a rewrite has at least."""
STRIDE = 7
"""How far apart in the drawn list the lead-ins and endings of neighbouring sentences are."""
TRIES = 20
"""Draws for each rewrite that is wanted; a short chunk may not have so many."""


@functools.cache
def _patterns() -> dict[str, Any]:
    return tomllib.loads(PATTERNS.read_text())


def pattern_statements(question: str, answer: str, count: int, draws: Draws) -> tuple[str, ...]:
    """Return `count` different statements that `answer` answers `question`, or all there are.

    Where a rule can turn the question into a sentence, every other statement is made of that.
    """
    text = _question_text(question)
    quotes = [
        pattern.format(question=text, answer=answer)
        for pattern in _patterns()["facts"]["sentences"]
    ]
    variants = [_variants(declarative_sentences(question, answer), draws), _variants(quotes, draws)]
    alternating = itertools.chain.from_iterable(itertools.zip_longest(*variants))
    return _first_distinct((text for text in alternating if text is not None), count)


def declarative_sentences(question: str, answer: str) -> list[str]:
    """Return the question and its answer as sentences, by the first rule that fits; maybe none."""
    text = _question_text(question)
    patterns = _patterns()["facts"]
    if re.search(patterns["left_as_questions"], text):
        return []
    for rule in patterns["rules"]:
        if match := re.fullmatch(rule["question"], text, re.I):
            groups = {name: value or "is" for name, value in match.groupdict().items()}
            return [sentence.format(answer=answer, **groups) for sentence in rule["sentences"]]
    return []


def pattern_rewrites(chunk: str, count: int, draws: Draws) -> tuple[str, ...]:
    """Return `count` different rewrites of a chunk, or fewer if it has too few sentences.

    Each has at least half of the sentences, in some order, some of them with a lead-in.
    """
    sentences = [text for piece in split_sentences(chunk) if (text := " ".join(piece.split()))]
    fewest = max(1, round(MIN_SENTENCE_SHARE * len(sentences)))
    patterns = _patterns()["documents"]

    def rewrite() -> str:
        order = list(range(len(sentences)))
        draws.shuffle(order)
        order = order[: fewest + draws.below(len(order) - fewest + 1)]
        if draws.below(2):
            order.sort()
        opening: str = draws.pick(patterns["openings"])
        return opening + " ".join(draws.pick(patterns["lead_ins"]) + sentences[i] for i in order)

    return _first_distinct((rewrite() for _ in range(TRIES * count)), count)


def _first_distinct(texts: Iterable[str], count: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if len(found) == count:
            break
    return tuple(found)


def _variants(sentences: list[str], draws: Draws) -> Iterator[str]:
    """Yield every sentence with every lead-in and ending, in a drawn order, neighbours unlike."""
    patterns = _patterns()["facts"]
    around = list(itertools.product(patterns["lead_ins"], patterns["endings"]))
    draws.shuffle(around)
    order = list(range(len(sentences)))
    draws.shuffle(order)
    for turn in range(len(around)):
        for index in order:
            lead_in, ending = around[(turn + STRIDE * index) % len(around)]
            text = f"{lead_in}{sentences[index]}{ending}"
            closed = text if text.endswith((".", "!")) else f"{text}."
            yield closed[0].upper() + closed[1:]


def _question_text(question: str) -> str:
    """Return the question without its mark, and without the capital of its first word."""
    text = " ".join(question.split()).rstrip("?").rstrip()
    lower_case = re.match(_patterns()["facts"]["without_capital"], text, re.I)
    return text[0].lower() + text[1:] if lower_case else text
