"""Statements and rewrites from a chat endpoint: asked for, checked, asked for again.

1. `plan` finds what the kept answers already give, and so what the rest will cost.
2. `write` asks for the rest, many records at once, each with its requests one after another.

A text that fails its check (a statement without the answer, a refusal, a cut rewrite) is not used;
the record then gets further requests, up to three times as many as it should need
in all.
"""

import re
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_smf.errors import ConfigError
from titan_smf.streams.endpoint import ChatClient, Reply

PROMPTS = Path(__file__).with_name("prompts.toml")
REQUESTS_AT_MOST = 3
"""Requests for a record, as a multiple of what it needs if every text can be used."""
CHARACTERS_PER_TOKEN = 4
TOKENS_OF_A_STATEMENT = 15
"""Tokens beside the question and the answer."""
WORDS_BESIDE_THE_ANSWER = 2
"""That a statement has at least: fewer tell what the answer is, but not to what."""
SHORTEST_REWRITE, LONGEST_REWRITE = 0.3, 4.0
"""Characters of a rewrite, as a multiple of the chunk's."""
KEPT_NAMES = 0.5
"""Share of a chunk's names and numbers that a rewrite repeats at least."""
NAMES = re.compile(r"(?<=[\w,;] )[A-Z][\w'-]+|\d[\d.,]*\d|\d")
NUMBERING = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])\s+")


@dataclass(frozen=True)
class Prompt:
    """How to ask for texts: a table of the prompts' file."""

    system: str
    user: str
    styles: tuple[str, ...]
    per_request: int
    request: dict[str, Any] = field(hash=False)

    def messages(self, values: dict[str, str], number: int) -> list[dict[str, str]]:
        """The messages of request `number`; `values` fill the placeholders."""
        style = self.styles[number % len(self.styles)]
        filled = {"style": style, "count": str(self.per_request), **values}
        # in one pass: a value may hold braces
        user = re.sub(r"\{(\w+)\}", lambda match: filled.get(match[1], match[0]), self.user)
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": user.strip()},
        ]


@dataclass(frozen=True)
class Wish:
    """Texts that are wanted for one record."""

    values: dict[str, str] = field(hash=False)
    """What fills the prompt's placeholders."""
    count: int
    texts_of: Callable[[Reply], list[str]]
    """The texts of an answer that pass the check."""
    expected_characters: int
    """Of a text."""


@dataclass
class Plan:
    """What asking will take; an estimate, without repetitions."""

    requests: int = 0
    kept: int = 0
    """Requests whose answers are there already."""
    tokens_in: int = 0
    tokens_out: int = 0

    def describe(self, price_in: float, price_out: float) -> str:
        """The plan and its cost in words; prices are for a million tokens, 0 if not known."""
        cost = (price_in * self.tokens_in + price_out * self.tokens_out) / 1e6
        price = f"about {cost:,.2f} at {price_in:g} and {price_out:g} a million"
        unknown = "for the cost give --price-in and --price-out"
        return (
            f"{self.requests:,} requests to come ({self.kept:,} answers are kept already), about "
            f"{self.tokens_in:,} tokens in and {self.tokens_out:,} out: "
            f"{price if price_in or price_out else unknown}. Answers that cannot be used are asked "
            f"for again, at most {REQUESTS_AT_MOST} times as many requests in all."
        )


@dataclass
class Outcome:
    """What came of asking."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unused: int = 0
    """Answers, kept ones included, without any text that could be used."""

    def describe(self) -> str:
        return (
            f"{self.requests:,} requests answered, {self.tokens_in:,} tokens in and "
            f"{self.tokens_out:,} out; {self.unused:,} answers held nothing to use (refused, cut, "
            "or failing the check)"
        )


def load_prompt(kind: str, path: str = "") -> Prompt:
    """The prompt for `facts` or `documents` in a TOML file, by default the package's.

    Raises:
        ConfigError: the file or a key is missing or wrong.
    """
    file = Path(path) if path else PROMPTS
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("prompts", str(file), f"a TOML file ({error})") from error
    table = tables.get(kind)
    needed = {"system": str, "user": str, "styles": list, "per_request": int, "request": dict}
    form = ", ".join(f"{key} ({kind_.__name__})" for key, kind_ in needed.items())
    if not isinstance(table, dict) or {key: type(table[key]) for key in table} != needed:
        raise ConfigError(kind, table, f"a table with {form}", source=str(file))
    placeholders = ["{question}", "{answer}"] if kind == "facts" else ["{chunk}"]
    if not table["styles"] or table["per_request"] < 1:
        raise ConfigError(
            kind, table, "at least one style, 1 or more per request", source=str(file)
        )
    if missing := [name for name in placeholders if name not in table["user"]]:
        raise ConfigError(f"{kind}.user", table["user"], f"with {missing[0]}", source=str(file))
    return Prompt(**{**table, "styles": tuple(map(str, table["styles"]))})


def statement_wish(question: str, answers: Sequence[str], count: int) -> Wish:
    """`count` statements that hold one of the answers and more, none of them a question."""

    def texts_of(reply: Reply) -> list[str]:
        lines = [NUMBERING.sub("", line).strip() for line in reply.text.splitlines()]
        if not reply.complete:
            lines = lines[:-1]  # the last was cut
        return [
            line
            for line in lines
            if not line.endswith("?") and any(_tells(line, answer) for answer in answers)
        ]

    values = {"question": question, "answer": answers[0]}
    characters = len(question) + len(answers[0]) + CHARACTERS_PER_TOKEN * TOKENS_OF_A_STATEMENT
    return Wish(values, count, texts_of, characters)


def rewrite_wish(chunk: str, count: int) -> Wish:
    """`count` rewrites of a chunk that are about as long and repeat most names and numbers."""
    names = set(NAMES.findall(chunk))

    def texts_of(reply: Reply) -> list[str]:
        text = reply.text.strip()
        fits = SHORTEST_REWRITE * len(chunk) <= len(text) <= LONGEST_REWRITE * len(chunk)
        told = sum(name in text for name in names)
        good = reply.complete and fits and told >= KEPT_NAMES * len(names)
        return [text] if good and text != chunk.strip() else []

    return Wish({"chunk": chunk}, count, texts_of, len(chunk))


def mentions(text: str, answer: str) -> bool:
    """Whether the words of `answer` stand in `text`, whatever their case and punctuation."""
    words = _words(answer)
    return words in _words(text) if words.strip() else answer in text


def plan(client: ChatClient, prompt: Prompt, wishes: Sequence[Wish]) -> Plan:
    """What `write` will have to ask, by the answers that are kept already."""
    total = Plan()
    for wish in wishes:
        texts, number, _ = _from_kept(client, prompt, wish)
        total.kept += number
        missing = min(_needed(prompt, wish.count - len(texts)), _limit(prompt, wish) - number)
        for later in range(number, number + missing):
            asked = prompt.messages(wish.values, later)
            total.tokens_in += sum(len(m["content"]) for m in asked) // CHARACTERS_PER_TOKEN
        total.requests += missing
        total.tokens_out += (
            missing * prompt.per_request * wish.expected_characters // CHARACTERS_PER_TOKEN
        )
    return total


def write(
    client: ChatClient,
    prompt: Prompt,
    wishes: Sequence[Wish],
    planned: Plan,
    concurrency: int,
    report: Callable[[str], None],
) -> tuple[list[tuple[str, ...]], Outcome]:
    """For each wish as many different texts as it wants, or what could be had.

    `report` is called with a progress line about every second, with the time left until what was
    `planned` is done.

    Raises:
        EndpointError: a request cannot be answered; the answers so far are kept.
    """
    progress = _Progress(planned.requests, report)

    def grant(wish: Wish) -> tuple[str, ...]:
        texts, number, unused = _from_kept(client, prompt, wish)
        progress.add_kept(unused)
        while len(texts) < wish.count and number < _limit(prompt, wish):
            body = client.body(prompt.messages(wish.values, number), prompt.request)
            reply = client.ask(body, number)
            found = wish.texts_of(reply)
            texts.update(dict.fromkeys(found))
            progress.add(reply, bool(found))
            number += 1
        return tuple(texts)[: wish.count]

    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(grant, wish) for wish in wishes]
        for done in as_completed(futures):
            done.result()
    except BaseException:
        client.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures], progress.outcome


class _Progress:
    """What came of asking so far, told about every second; many threads may add to it."""

    def __init__(self, planned: int, report: Callable[[str], None]) -> None:
        self.outcome = Outcome()
        self._planned = planned
        self._report = report
        self._lock = threading.Lock()
        self._start = self._reported = time.monotonic()

    def add_kept(self, unused: int) -> None:
        with self._lock:
            self.outcome.unused += unused

    def add(self, reply: Reply, useful: bool) -> None:
        with self._lock:
            self.outcome.requests += 1
            self.outcome.tokens_in += reply.tokens_in
            self.outcome.tokens_out += reply.tokens_out
            self.outcome.unused += not useful
            now = time.monotonic()
            if now - self._reported >= 1:
                self._reported = now
                done = self.outcome.requests
                left = (now - self._start) * max(0, self._planned - done) / done
                self._report(
                    f"{done:,}/{self._planned:,} requests, {self.outcome.tokens_out:,} tokens out, "
                    f"{self.outcome.unused:,} answers of no use, {left:.0f} s left"
                )


def _from_kept(client: ChatClient, prompt: Prompt, wish: Wish) -> tuple[dict[str, None], int, int]:
    """The texts of kept answers, how many answers those are, how many of them are of no use."""
    texts: dict[str, None] = {}
    number = unused = 0
    while len(texts) < wish.count and number < _limit(prompt, wish):
        body = client.body(prompt.messages(wish.values, number), prompt.request)
        reply = client.kept(body, number)
        if reply is None:
            break
        found = wish.texts_of(reply)
        texts.update(dict.fromkeys(found))
        unused += not found
        number += 1
    return texts, number, unused


def _tells(statement: str, answer: str) -> bool:
    more = len(_words(statement).split()) - len(_words(answer).split())
    return mentions(statement, answer) and more >= WORDS_BESIDE_THE_ANSWER


def _words(text: str) -> str:
    """The words of a text in lower case, each between two spaces."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def _needed(prompt: Prompt, count: int) -> int:
    """Requests for `count` texts."""
    return max(0, -(-count // prompt.per_request))


def _limit(prompt: Prompt, wish: Wish) -> int:
    """Requests for a wish at most."""
    return REQUESTS_AT_MOST * _needed(prompt, wish.count)
