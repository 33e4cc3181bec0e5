"""Facts and chunks in other words without a model, by the patterns of a TOML file.

The patterns that come with the package (`patterns.toml`) are simple: statements of a fact either
quote its question or turn it into a sentence where a rule can, rewrites of a chunk only reorder its
sentences. They make a stream from any question set or text; what a language model writes teaches
more. Draws are seeded: the same input gives the same text everywhere.
"""

import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_smf.streams.chunks import sentences_of
from titan_smf.world.names import Draws

PATTERNS = Path(__file__).with_name("patterns.toml")
KEPT_LOWER = re.compile(r"(?:who|what|whose|whom|which|where|when|why|how|in|on|at|from)\b", re.I)
TWO_QUESTIONS = re.compile(r"\b(?:and|or) (?:who|what|which|where|when|why|how)\b")
DANGLING = re.compile(
    r"\b(?:about|after|against|around|as|at|be|been|being|between|by|do|does|doing|during|for|from|"
    r"in|into|like|of|off|on|onto|over|through|to|under|with|within)$"
)
KEPT_SENTENCES = 0.5
"""Share of a chunk's sentences that a rewrite has at least."""
APART = 7
"""How far apart in the drawn list the lead-ins and endings of neighbouring sentences are."""
TRIES = 20
"""Draws for each rewrite that is wanted; a short chunk may not have so many."""


@dataclass(frozen=True)
class Rule:
    """How questions of one form become sentences."""

    question: re.Pattern[str]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Patterns:
    """What statements and rewrites are made of."""

    lead_ins: tuple[str, ...]
    endings: tuple[str, ...]
    sentences: tuple[str, ...]
    """With {question} and {answer}."""
    rules: tuple[Rule, ...]
    chunk_lead_ins: tuple[str, ...]
    chunk_openings: tuple[str, ...]


def load_patterns() -> Patterns:
    """The patterns of the package."""
    patterns = tomllib.loads(PATTERNS.read_text())
    facts, documents = patterns["facts"], patterns["documents"]
    return Patterns(
        tuple(facts["lead_ins"]),
        tuple(facts["endings"]),
        tuple(facts["sentences"]),
        tuple(
            Rule(re.compile(rule["question"], re.I), tuple(rule["sentences"]))
            for rule in facts["rules"]
        ),
        tuple(documents["lead_ins"]),
        tuple(documents["openings"]),
    )


def pattern_statements(
    question: str, answer: str, count: int, patterns: Patterns, draws: Draws
) -> tuple[str, ...]:
    """`count` statements that `answer` answers `question`, all different, or all there are.

    Where a rule can turn the question into a sentence, every other statement is made of that.
    """
    asked = _asked(question)
    quoting = [pattern.format(question=asked, answer=answer) for pattern in patterns.sentences]
    forms = [_forms(declaratives(question, answer, patterns.rules), patterns, draws)]
    forms.append(_forms(quoting, patterns, draws))
    made: dict[str, None] = {}
    for statement in itertools.chain.from_iterable(itertools.zip_longest(*forms)):
        if len(made) == count:
            break
        if statement is not None:
            made.setdefault(statement)
    return tuple(made)


def declaratives(question: str, answer: str, rules: Sequence[Rule]) -> list[str]:
    """The question and its answer as sentences, by the first rule that fits; none fits many."""
    asked = _asked(question)
    if TWO_QUESTIONS.search(asked) or DANGLING.search(asked):
        return []
    for rule in rules:
        if match := rule.question.fullmatch(asked):
            groups = {name: value or "is" for name, value in match.groupdict().items()}
            return [text.format(answer=answer, **groups) for text in rule.sentences]
    return []


def pattern_rewrites(chunk: str, count: int, patterns: Patterns, draws: Draws) -> tuple[str, ...]:
    """`count` rewrites of a chunk, all different, or fewer where it has too few sentences.

    Each has at least half of the sentences, in some order, some of them with a lead-in.
    """
    sentences = [text for piece in sentences_of(chunk) if (text := " ".join(piece.split()))]
    fewest = max(1, round(KEPT_SENTENCES * len(sentences)))
    made: dict[str, None] = {}
    for _ in range(TRIES * count):
        if len(made) == count:
            break
        order = list(range(len(sentences)))
        draws.shuffle(order)
        order = order[: fewest + draws.below(len(order) - fewest + 1)]
        if draws.below(2):
            order.sort()
        said = (draws.pick(patterns.chunk_lead_ins) + sentences[index] for index in order)
        made.setdefault(draws.pick(patterns.chunk_openings) + " ".join(said))
    return tuple(made)


def _forms(sentences: list[str], patterns: Patterns, draws: Draws) -> Iterator[str]:
    """Every sentence with every lead-in and ending, in a drawn order, neighbours unlike."""
    around = list(itertools.product(patterns.lead_ins, patterns.endings))
    draws.shuffle(around)
    order = list(range(len(sentences)))
    draws.shuffle(order)
    for turn in range(len(around)):
        for index in order:
            lead_in, ending = around[(turn + APART * index) % len(around)]
            text = f"{lead_in}{sentences[index]}{ending}"
            closed = text if text.endswith((".", "!")) else f"{text}."
            yield closed[0].upper() + closed[1:]


def _asked(question: str) -> str:
    """The question without its mark, and without the capital of its first word."""
    text = " ".join(question.split()).rstrip("?").rstrip()
    return text[0].lower() + text[1:] if KEPT_LOWER.match(text) else text
