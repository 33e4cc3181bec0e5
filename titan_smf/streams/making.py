"""Fact and document streams out of question sets and text, and text that states facts.

The statements of a fact, or rewrites of a chunk, come from a field of the input, from patterns, or
from a chat endpoint. The same input and settings give the same stream, apart from what a model
answers; a record without any text is left out, and named.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

from titan_smf import storage
from titan_smf.data.fields import RowError, id_of, text_of, texts_of
from titan_smf.data.raw_text import Rejected, TextOptions, plan_pieces, read_documents
from titan_smf.data.rows import Row, read_rows
from titan_smf.errors import ConfigError, DataError
from titan_smf.streams.chunks import split_chunks
from titan_smf.streams.endpoint import ChatClient, EndpointOptions
from titan_smf.streams.paraphrases import pattern_rewrites, pattern_statements
from titan_smf.streams.question_sets import read_questions
from titan_smf.streams.records import AnyRecord, Document, Fact
from titan_smf.streams.rewriting import (
    RewriteRequest,
    estimate,
    load_prompt,
    rewrite_request,
    statement_request,
    write_texts,
)
from titan_smf.world.names import Draws

SENTENCES_OF_A_TEXT = (3, 7)
MAX_NAMED = 10
"""Ids that a message lists."""

Item = TypeVar("Item")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Subset:
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
        """Return the items of the subset, in their order."""
        part, num_parts = map(int, (self.part or "1/1").split("/"))

        def is_in_part(item: Item) -> bool:
            words = " ".join(re.findall(r"\w+", text_of_item(item).casefold()))
            return int(storage.sha256_hex(words.encode(), 16), base=16) % num_parts == part - 1

        stop = self.skip + self.limit if self.limit else None
        return list(itertools.islice(filter(is_in_part, items), self.skip, stop))


@dataclass(frozen=True)
class StreamOptions:
    """What a stream is made of."""

    count: int = 64
    """Statements of a fact, or rewrites of a chunk; a field may have fewer or more."""
    seed: int = 0
    """Of the patterns."""
    from_field: str = ""
    """The field of the input that has the statements or rewrites."""
    endpoint: EndpointOptions | None = None
    """The chat endpoint that writes them; without it and a field, patterns do."""
    subset: Subset = Subset()
    text: TextOptions = field(default_factory=TextOptions)
    """Where the text of documents is."""
    chunk_words: int = 100
    """Words of a document's chunk, about."""

    def __post_init__(self) -> None:
        for name in ("count", "chunk_words"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "1 or more")
        if self.from_field and self.endpoint:
            raise ConfigError("endpoint", self.endpoint.url, "not together with a field")


def make_facts(path: str, options: StreamOptions, report: Report) -> list[Fact]:
    """Return the questions of a set (see `question_sets.open_questions`) as facts to learn.

    Raises:
        DataError: an input that cannot be used, or nothing to make a stream of.
        EndpointError: the endpoint does not answer.
    """
    pairs = options.subset.of(read_questions(path), lambda pair: pair[0].question)
    requests = [statement_request(q.question, q.answers, options.count) for q, _ in pairs]
    rows = [row for _, row in pairs]
    texts = _texts("facts", pattern_statements, requests, rows, options, report)
    facts = [
        Fact(question.id, statements, question.question, question.answers)
        for (question, _), statements in zip(pairs, texts, strict=True)
    ]
    return _without_empty(path, facts, options, report)


def make_documents(inputs: list[str], options: StreamOptions, report: Report) -> list[Document]:
    """Return the text of the inputs, in chunks, as documents to learn.

    With `options.from_field`, the inputs are rows (see `rows.read_rows`) whose field
    `options.text.field` holds a chunk as it is.

    Raises: as `make_facts`.
    """
    found = _stored_chunks(inputs, options) if options.from_field else _chunks(inputs, options)
    chunks = options.subset.of(found, lambda chunk: chunk.text)
    requests = [rewrite_request(chunk.text, options.count) for chunk in chunks]
    rows = [chunk.row for chunk in chunks]
    texts = _texts("documents", pattern_rewrites, requests, rows, options, report)
    documents = [
        Document(chunk.id, chunk.text, rewrites)
        for chunk, rewrites in zip(chunks, texts, strict=True)
    ]
    return _without_empty(", ".join(inputs), documents, options, report)


def text_of_facts(
    facts: Sequence[Fact], num_statements: int, asked_share: float, seed: int
) -> list[dict[str, str]]:
    """Return text that states each fact `num_statements` times, and asks a share as often.

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
    """Write one JSON line a record, the file complete or absent; return its bytes."""
    rows = (record if isinstance(record, dict) else asdict(record) for record in records)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    storage.write_bytes(path, content)
    return len(content)


def _texts(
    kind: str,
    from_patterns: Callable[..., tuple[str, ...]],
    requests: Sequence[RewriteRequest],
    rows: Sequence[Row],
    options: StreamOptions,
    report: Report,
) -> list[tuple[str, ...]]:
    """Return the texts of each record, from where the options say."""
    if options.from_field:
        stored = (_field(row, options.from_field, texts_of) for row in rows)
        return [tuple(dict.fromkeys(texts)) for texts in stored]
    if options.endpoint:
        return _texts_of_endpoint(kind, requests, options.endpoint, report)
    return [
        from_patterns(**request.values, count=options.count, draws=Draws(options.seed, kind, i))
        for i, request in enumerate(requests)
    ]


def _texts_of_endpoint(
    kind: str, requests: Sequence[RewriteRequest], options: EndpointOptions, report: Report
) -> list[tuple[str, ...]]:
    """Return what an endpoint writes, once its cost was agreed to."""
    prompt = load_prompt(kind, options.prompts)
    client = ChatClient(options, report)
    expected = estimate(client, prompt, requests)
    report(expected.describe_estimate(options.price_in, options.price_out))
    if expected.requests and not options.agreed:
        if not sys.stdin.isatty():
            raise ConfigError("yes", "no terminal to ask at", "--yes, to agree to this cost")
        if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise DataError("stopped; nothing was asked")
    texts, usage = write_texts(client, prompt, requests, report, expected.requests)
    report(usage.describe())
    return texts


class _Chunk(NamedTuple):
    id: str
    text: str
    row: Row


def _chunks(inputs: list[str], options: StreamOptions) -> Iterable[_Chunk]:
    """Yield the text of the inputs in chunks, named by document and place in it."""
    number = 0
    for piece in plan_pieces(inputs, options.text):
        for document in read_documents([piece], options.text):
            if isinstance(document, Rejected):
                raise DataError(f"{document.where}: {document.cause}; correct or remove it")
            for place, chunk in enumerate(split_chunks(document, options.chunk_words)):
                name = f"{number:06d}-{place:03d}"
                yield _Chunk(name, chunk.strip(), Row(f"{piece.path}: {name}", {}))
            number += 1


def _stored_chunks(inputs: list[str], options: StreamOptions) -> Iterable[_Chunk]:
    """Yield rows that hold a chunk each, with the row's `id` or else its number."""
    where: dict[str, str] = {}
    for number, row in enumerate(row for path in inputs for row in read_rows(path)):
        name = _field(row, "id", id_of) if "id" in row.values else f"{number:06d}"
        text = _field(row, options.text.field, text_of)
        if name in where:
            message = f"has the id {name!r} of {where[name]}; give each its own"
            raise DataError(f"{row.where}: {message}")
        where[name] = row.where
        yield _Chunk(name, text, row)


def _field(row: Row, name: str, check: Callable[[Any, str], Item]) -> Item:
    try:
        if name not in row.values:
            raise RowError(f"has no field {name!r}, but {', '.join(row.values) or 'none'}")
        return check(row.values[name], name)
    except RowError as error:
        raise DataError(f"{row.where}: {error}") from error


def _without_empty(
    source: str, records: list[AnyRecord], options: StreamOptions, report: Report
) -> list[AnyRecord]:
    """Return the records that have texts; report those that have none or few."""
    few = [record.id for record in records if 0 < len(record.texts) < options.count]
    none = [record.id for record in records if not record.texts]
    if few and not options.from_field:
        report(f"fewer than {options.count} texts: {_listed(few)}")
    if none:
        report(f"left out, without any text: {_listed(none)}")
    if len(none) == len(records):
        raise DataError(f"{source}: gives no record (part, skip and limit may leave none)")
    return [record for record in records if record.texts]


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - MAX_NAMED:,} more" if len(ids) > MAX_NAMED else ""
    return f"{len(ids):,} records ({', '.join(ids[:MAX_NAMED])}{more})"


def _groups(items: list[Item], draws: Draws) -> Iterable[list[Item]]:
    """Yield the items in a drawn order, a few at a time."""
    draws.shuffle(items)
    fewest, most = SENTENCES_OF_A_TEXT
    start = 0
    while start < len(items):
        size = fewest + draws.below(most - fewest + 1)
        yield items[start : start + size]
        start += size
