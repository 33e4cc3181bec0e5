"""Fact and document streams out of question sets and text, and text that states facts.

The statements of a fact, or rewrites of a chunk, come from a field of the input, from patterns, or
from a chat endpoint. The same input and settings give the same stream, apart from what a model
answers; a record for which nothing could be had is left out, and named.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from titan_smf import storage
from titan_smf.data.fields import RowError, id_of, text_of, texts_of
from titan_smf.data.raw_text import Rejected, TextOptions, plan_pieces, read_documents
from titan_smf.data.rows import Row, read_rows
from titan_smf.errors import ConfigError, DataError
from titan_smf.streams.chunks import chunks_of
from titan_smf.streams.endpoint import ChatClient, Endpoint
from titan_smf.streams.paraphrases import load_patterns, pattern_rewrites, pattern_statements
from titan_smf.streams.question_sets import Question, read_questions
from titan_smf.streams.records import Document, Fact
from titan_smf.streams.rewriting import Wish, load_prompt, plan, rewrite_wish, statement_wish, write
from titan_smf.world.names import Draws

PIECE_BYTES = 64 << 20
SENTENCES_OF_A_TEXT = (3, 7)
NAMED_AT_MOST = 10
"""Ids that a message lists."""

Item = TypeVar("Item")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """Which records of an input are taken: those of a part, then `limit` of them after `skip`."""

    part: str = ""
    """`i/n`: the i-th of n parts. The words of a record decide where it belongs: the parts share
    none, however the input is ordered, and have about equal sizes. Empty: all."""
    skip: int = 0
    limit: int = 0
    """0: all."""

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if self.part and not (match and 1 <= int(match[1]) <= int(match[2])):
            raise ConfigError("part", self.part, "i/n with i from 1 to n, for example 1/2")
        if self.skip < 0 or self.limit < 0:
            raise ConfigError("skip, limit", f"{self.skip}, {self.limit}", "0 or more")

    def of(self, items: Iterable[Item], text_of_item: Callable[[Item], str]) -> list[Item]:
        """The chosen items, in their order."""
        chosen: list[Item] = []
        place, parts = map(int, self.part.split("/")) if self.part else (1, 1)
        passed = 0
        for item in items:
            words = " ".join(re.findall(r"\w+", text_of_item(item).casefold()))
            digest = hashlib.sha256(words.encode()).digest()
            if int.from_bytes(digest[:8], "big") % parts != place - 1:
                continue
            passed += 1
            if passed > self.skip:
                chosen.append(item)
            if self.limit and len(chosen) == self.limit:
                break
        return chosen


@dataclass(frozen=True)
class Asking:
    """How texts are had from an endpoint."""

    endpoint: Endpoint
    prompts: str = ""
    """A TOML file; empty for the package's."""
    cache: str = ""
    """The folder of the kept answers; empty for one in the user's cache."""
    concurrency: int = 8
    price_in: float = 0.0
    """For a million tokens; 0 if not known."""
    price_out: float = 0.0
    agreed: bool = False
    """Do not ask before the first request."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError("concurrency", self.concurrency, "1 or more")


@dataclass(frozen=True)
class Making:
    """What a stream is made with."""

    count: int = 64
    """Statements of a fact, or rewrites of a chunk; a field may have fewer or more."""
    seed: int = 0
    """Of the patterns."""
    field: str = ""
    """The field of the input that has the texts."""
    asking: Asking | None = None
    choice: Choice = Choice()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError("count", self.count, "1 or more")
        if self.field and self.asking:
            raise ConfigError("endpoint", self.asking.endpoint.url, "not together with a field")


def make_facts(path: str, making: Making, report: Report) -> list[Fact]:
    """The questions of a set (see `question_sets.open_questions`) as facts to learn.

    Raises:
        DataError: an input that cannot be used, or nothing to make a stream of.
        EndpointError: the endpoint does not answer.
    """
    pairs = making.choice.of(read_questions(path), lambda pair: pair[0].question)

    def by_patterns(pair: tuple[Question, Row], draws: Draws) -> tuple[str, ...]:
        question = pair[0]
        return pattern_statements(
            question.question, question.answers[0], making.count, patterns, draws
        )

    def wish(pair: tuple[Question, Row]) -> Wish:
        return statement_wish(pair[0].question, pair[0].answers, making.count)

    patterns = load_patterns()
    texts = _texts("facts", pairs, lambda pair: pair[1], by_patterns, wish, making, report)
    facts = [
        Fact(question.id, statements, question.question, question.answers)
        for (question, _), statements in zip(pairs, texts, strict=True)
    ]
    return _without_empty(path, facts, making, report)


def make_documents(
    inputs: list[str],
    making: Making,
    report: Report,
    text: TextOptions | None = None,
    chunk_words: int = 100,
) -> list[Document]:
    """The text of the inputs, in chunks of about `chunk_words` words, as documents to learn.

    With `making.field`, the inputs are rows (see `rows.read_rows`) whose field `text.field` holds a
    chunk as it is.

    Raises: as `make_facts`.
    """
    options = text or TextOptions()
    if chunk_words < 1:
        raise ConfigError("chunk_words", chunk_words, "1 or more")
    if making.field:
        found = _stored_chunks(inputs, options.field)
    else:
        found = _chunks(inputs, options, chunk_words)
    chunks = making.choice.of(found, lambda chunk: chunk.text)

    def by_patterns(chunk: _Chunk, draws: Draws) -> tuple[str, ...]:
        return pattern_rewrites(chunk.text, making.count, patterns, draws)

    def wish(chunk: _Chunk) -> Wish:
        return rewrite_wish(chunk.text, making.count)

    patterns = load_patterns()
    texts = _texts("documents", chunks, lambda chunk: chunk.row, by_patterns, wish, making, report)
    documents = [
        Document(chunk.id, chunk.text, rewrites)
        for chunk, rewrites in zip(chunks, texts, strict=True)
    ]
    return _without_empty(", ".join(inputs), documents, making, report)


def text_of_facts(
    facts: Sequence[Fact], num_statements: int, asked_share: float, seed: int
) -> list[dict[str, str]]:
    """Text that states each fact `num_statements` times, and asks a share of them once each time.

    A text is a few statements of different facts, or a few `Q: ...\\nA: ...`. What is left of a
    fact's statements is in no text, to test with. The facts that are asked depend on their ids and
    the seed alone.
    """
    if num_statements < 1:
        raise ConfigError("statements", num_statements, "1 or more")
    if not 0 <= asked_share <= 1:
        raise ConfigError("asked_share", asked_share, "from 0 to 1")
    draws = Draws(seed, "text")
    sentences, answered = [], []
    for fact in facts:
        sentences += [fact.statements[i % len(fact.statements)] for i in range(num_statements)]
        if Draws(seed, "asked", fact.id).below(10_000) < 10_000 * asked_share:
            answered += [f"Q: {fact.question}\nA: {fact.answers[0]}"] * num_statements
    texts = [" ".join(group) for group in _groups(sentences, draws)]
    texts += ["\n".join(group) for group in _groups(answered, draws)]
    draws.shuffle(texts)
    return [{"text": text} for text in texts]


def check_output(path: str, overwrite: bool) -> None:
    """Raise before any work unless the output can be written and is free."""
    if not path.endswith(".jsonl"):
        raise ConfigError("output", path, "a path or URL that ends in .jsonl")
    if storage.exists(path) and not overwrite:
        raise DataError(f"{path}: exists; choose another output, or give --overwrite")


def write_lines(path: str, records: Sequence[Any]) -> int:
    """Write one JSON line a record, a file complete or absent; returns its bytes."""
    rows = (record if isinstance(record, dict) else asdict(record) for record in records)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    storage.write_bytes(path, content)
    return len(content)


def _texts(
    kind: str,
    items: Sequence[Item],
    row_of: Callable[[Item], Row],
    by_patterns: Callable[[Item, Draws], tuple[str, ...]],
    wish: Callable[[Item], Wish],
    making: Making,
    report: Report,
) -> list[tuple[str, ...]]:
    """The texts of each item, from where `making` says."""
    if making.field:
        return [_stored_texts(row_of(item), making.field) for item in items]
    if making.asking:
        return _asked(kind, [wish(item) for item in items], making.asking, report)
    return [
        by_patterns(item, Draws(making.seed, kind, number)) for number, item in enumerate(items)
    ]


def _asked(
    kind: str, wishes: Sequence[Wish], asking: Asking, report: Report
) -> list[tuple[str, ...]]:
    """What an endpoint writes, once its cost was agreed to."""
    prompt = load_prompt(kind, asking.prompts)
    cache = Path(asking.cache) if asking.cache else storage.default_cache_dir() / "endpoint"
    client = ChatClient(asking.endpoint, cache, report)
    planned = plan(client, prompt, wishes)
    report(planned.describe(asking.price_in, asking.price_out))
    if planned.requests and not asking.agreed:
        if not sys.stdin.isatty():
            raise ConfigError("yes", "no terminal to ask at", "--yes, to agree to this cost")
        if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise DataError("stopped; nothing was asked")
    texts, outcome = write(client, prompt, wishes, planned, asking.concurrency, report)
    report(outcome.describe())
    return texts


@dataclass(frozen=True)
class _Chunk:
    id: str
    text: str
    row: Row


def _chunks(inputs: list[str], options: TextOptions, chunk_words: int) -> Iterable[_Chunk]:
    """The text of the inputs in chunks, named by document and place in it."""
    number = 0
    for piece in plan_pieces(inputs, options, PIECE_BYTES):
        for document in read_documents(piece, options):
            if isinstance(document, Rejected):
                raise DataError(f"{document.where}: {document.cause}; correct or remove it")
            for place, chunk in enumerate(chunks_of(document, chunk_words)):
                name = f"{number:06d}-{place:03d}"
                yield _Chunk(name, chunk.strip(), Row(f"{piece.path}: {name}", {}))
            number += 1


def _stored_chunks(inputs: list[str], name: str) -> Iterable[_Chunk]:
    """Rows that hold a chunk each, with the row's `id` or else its number."""
    where: dict[str, str] = {}
    for number, row in enumerate(row for path in inputs for row in read_rows(path)):
        try:
            chunk = _Chunk(
                id_of(row.values.get("id", f"{number:06d}"), "id"),
                text_of(_field(row, name), name),
                row,
            )
            if chunk.id in where:
                raise RowError(f"has the id {chunk.id!r} of {where[chunk.id]}; give each its own")
        except RowError as error:
            raise DataError(f"{row.where}: {error}") from error
        where[chunk.id] = row.where
        yield chunk


def _stored_texts(row: Row, name: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(texts_of(_field(row, name), name)))
    except RowError as error:
        raise DataError(f"{row.where}: {error}") from error


def _field(row: Row, name: str) -> Any:
    if name not in row.values:
        raise RowError(f"has no field {name!r}, but {', '.join(row.values) or 'none'}")
    return row.values[name]


def _without_empty(
    source: str, records: Sequence[Any], making: Making, report: Report
) -> list[Any]:
    """The records that have texts; says which have none, and which have few."""
    kept = [record for record in records if record.texts]
    few = [record.id for record in kept if len(record.texts) < making.count]
    none = [record.id for record in records if not record.texts]
    if few and not making.field:
        report(f"fewer than {making.count} texts: {_named(few)}")
    if none:
        report(f"left out, without any text: {_named(none)}")
    if not kept:
        raise DataError(f"{source}: gives no record (part, skip and limit may leave none)")
    return kept


def _named(ids: list[str]) -> str:
    more = f" and {len(ids) - NAMED_AT_MOST:,} more" if len(ids) > NAMED_AT_MOST else ""
    return f"{len(ids):,} records ({', '.join(ids[:NAMED_AT_MOST])}{more})"


def _groups(items: list[Item], draws: Draws) -> Iterable[list[Item]]:
    """The items in a drawn order, a few at a time."""
    draws.shuffle(items)
    fewest, most = SENTENCES_OF_A_TEXT
    start = 0
    while start < len(items):
        size = fewest + draws.below(most - fewest + 1)
        yield items[start : start + size]
        start += size
