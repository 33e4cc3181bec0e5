"""Statements and rewrites from a chat endpoint: asked for, checked, asked for again.

1. `estimate` finds what the cached answers already give, and so what the rest will cost.
2. `write_texts` asks for the rest, many records at once, each with its requests one after another.

A text that fails its check (a statement without the answer, a refusal, a cut rewrite) is not used;
the record then gets further requests, up to three times as many as it should need in all.
"""

import re
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_smf.errors import ConfigError
from titan_smf.progress import ProgressTimer
from titan_smf.streams.endpoint import ChatClient, Reply

PROMPTS = Path(__file__).with_name("prompts.toml")
MAX_REQUEST_FACTOR = 3
"""Requests for a record, as a multiple of what it needs if every text can be used."""
CHARACTERS_PER_TOKEN = 4
TOKENS_OF_A_STATEMENT = 15
"""Tokens beside the question and the answer."""
MIN_WORDS_BESIDE_ANSWER = 2
"""Of a statement: fewer tell what the answer is, but not to what."""
SHORTEST_REWRITE, LONGEST_REWRITE = 0.3, 4.0
"""Characters of a rewrite, as a multiple of the chunk's."""
MIN_NAME_SHARE = 0.5
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
    request: dict[str, Any]

    def body(self, model: str, values: dict[str, str], number: int) -> dict[str, Any]:
        """Return the body of request `number`; `values` fill the placeholders."""
        style = self.styles[number % len(self.styles)]
        filled = {"style": style, "count": str(self.per_request), **values}
        # in one pass: a value may hold braces
        user = re.sub(r"\{(\w+)\}", lambda match: filled.get(match[1], match[0]), self.user)
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": user.strip()},
        ]
        return {**self.request, "model": model, "messages": messages}

    def requests_for(self, count: int) -> int:
        """Return the requests that `count` texts take if all can be used."""
        return max(0, -(-count // self.per_request))


@dataclass(frozen=True)
class RewriteRequest:
    """Texts that are wanted for one record."""

    values: dict[str, str]
    """Values of the prompt's placeholders."""
    count: int
    usable_texts: Callable[[Reply], list[str]]
    """Returns the texts of an answer that pass the check."""
    expected_characters: int
    """Of a text."""


@dataclass
class Usage:
    """Requests to an endpoint: those that were answered, or an estimate of those to come."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0
    """Requests whose answers are there already."""
    unused: int = 0
    """Answers, cached ones included, without any text that could be used."""

    def describe_estimate(self, price_in: float, price_out: float) -> str:
        """Return the estimate and its cost in words; prices are for a million tokens, 0 unknown."""
        cost = (price_in * self.tokens_in + price_out * self.tokens_out) / 1e6
        price = f"about {cost:,.2f} at {price_in:g} and {price_out:g} a million"
        unknown = "for the cost give --price-in and --price-out"
        return (
            f"{self.requests:,} requests to come ({self.cached:,} answers are kept already), about "
            f"{self.tokens_in:,} tokens in and {self.tokens_out:,} out: "
            f"{price if price_in or price_out else unknown}. Answers that cannot be used are asked "
            f"for again, at most {MAX_REQUEST_FACTOR} times as many requests in all."
        )

    def add(self, reply: Reply, useful: bool) -> None:
        """Count an answer; a cached one costs nothing."""
        self.unused += not useful
        if not reply.cached:
            self.requests += 1
            self.tokens_in += reply.tokens_in
            self.tokens_out += reply.tokens_out

    def describe_progress(self, num_requests: int, seconds_left: float) -> str:
        """Return what was done so far of the requests, and how long the rest takes."""
        return (
            f"{self.requests:,}/{num_requests:,} requests, {self.tokens_out:,} tokens out, "
            f"{self.unused:,} answers of no use, {seconds_left:.0f} s left"
        )

    def describe(self) -> str:
        """Return what was used in words."""
        return (
            f"{self.requests:,} requests answered, {self.tokens_in:,} tokens in and "
            f"{self.tokens_out:,} out; {self.unused:,} answers held nothing to use (refused, cut, "
            "or failing the check)"
        )


def load_prompt(kind: str, path: str = "") -> Prompt:
    """Return the prompt for `facts` or `documents` of a TOML file, by default the package's.

    Raises:
        ConfigError: the file or a key is missing or wrong.
    """
    file = Path(path) if path else PROMPTS
    try:
        table = tomllib.loads(file.read_text()).get(kind)
    except (OSError, ValueError) as error:
        raise ConfigError("prompts", str(file), f"a TOML file ({error})") from error
    needed = {"system": str, "user": str, "styles": list, "per_request": int, "request": dict}
    if not isinstance(table, dict) or {key: type(table[key]) for key in table} != needed:
        keys = ", ".join(f"{key} ({type_.__name__})" for key, type_ in needed.items())
        raise ConfigError(kind, table, f"a table with {keys}", source=str(file))
    if not table["styles"] or table["per_request"] < 1:
        allowed = "at least one style, 1 or more per request"
        raise ConfigError(kind, table, allowed, source=str(file))
    for placeholder in ("{question}", "{answer}") if kind == "facts" else ("{chunk}",):
        if placeholder not in table["user"]:
            allowed = f"with {placeholder}"
            raise ConfigError(f"{kind}.user", table["user"], allowed, source=str(file))
    return Prompt(**{**table, "styles": tuple(map(str, table["styles"]))})


def statement_request(question: str, answers: Sequence[str], count: int) -> RewriteRequest:
    """Request `count` statements that hold an answer and more, none of them a question."""

    def usable_texts(reply: Reply) -> list[str]:
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
    return RewriteRequest(values, count, usable_texts, characters)


def rewrite_request(chunk: str, count: int) -> RewriteRequest:
    """Request `count` rewrites of a chunk, about as long, that repeat most names and numbers."""

    def usable_texts(reply: Reply) -> list[str]:
        text = reply.text.strip()
        names = set(NAMES.findall(chunk))
        fits = SHORTEST_REWRITE * len(chunk) <= len(text) <= LONGEST_REWRITE * len(chunk)
        told = sum(name in text for name in names)
        good = reply.complete and fits and told >= MIN_NAME_SHARE * len(names)
        return [text] if good and text != chunk.strip() else []

    return RewriteRequest({"chunk": chunk}, count, usable_texts, len(chunk))


def mentions(text: str, answer: str) -> bool:
    """Return whether the words of `answer` are in `text`, whatever their case and punctuation."""
    words = _words(answer)
    return words in _words(text) if words.strip() else answer in text


def estimate(client: ChatClient, prompt: Prompt, wanted: Sequence[RewriteRequest]) -> Usage:
    """Return what `write_texts` will ask for beyond the cached answers, without repetitions."""
    total = Usage()
    for request in wanted:
        cached = list(_answers(client, prompt, request, client.cached))
        texts = {text for _, found in cached for text in found}
        start, limit = len(cached), MAX_REQUEST_FACTOR * prompt.requests_for(request.count)
        missing = min(prompt.requests_for(request.count - len(texts)), limit - start)
        for number in range(start, start + missing):
            messages = prompt.body("", request.values, number)["messages"]
            characters = sum(len(message["content"]) for message in messages)
            total.tokens_in += characters // CHARACTERS_PER_TOKEN
        characters = missing * prompt.per_request * request.expected_characters
        total.tokens_out += characters // CHARACTERS_PER_TOKEN
        total.requests += missing
        total.cached += start
    return total


def write_texts(
    client: ChatClient,
    prompt: Prompt,
    wanted: Sequence[RewriteRequest],
    report: Callable[[str], None],
    num_requests: int,
) -> tuple[list[tuple[str, ...]], Usage]:
    """Return as many different texts as each record wants, or fewer, and what that took.

    `report` is called with a progress line about every second, with the time left until the
    expected `num_requests` are answered.

    Raises:
        EndpointError: a request cannot be answered; the answers so far are cached.
    """
    usage, lock, timer = Usage(), threading.Lock(), ProgressTimer(seconds_between_lines=1)

    def write(request: RewriteRequest) -> tuple[str, ...]:
        texts: dict[str, None] = {}
        for reply, found in _answers(client, prompt, request, client.ask):
            texts.update(dict.fromkeys(found))
            with lock:
                usage.add(reply, bool(found))
                if not reply.cached and timer.due():
                    left = timer.seconds_left(usage.requests, num_requests)
                    report(usage.describe_progress(num_requests, left))
        return tuple(texts)[: request.count]

    pool = ThreadPoolExecutor(client.options.concurrency)
    try:
        futures = [pool.submit(write, request) for request in wanted]
        for done in as_completed(futures):
            done.result()
    except BaseException:
        client.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures], usage


def _answers(
    client: ChatClient,
    prompt: Prompt,
    request: RewriteRequest,
    ask: Callable[[dict[str, Any], int], Reply | None],
) -> Iterator[tuple[Reply, list[str]]]:
    """Yield answers with their usable texts until there are enough, or as many as are allowed."""
    texts: set[str] = set()
    for number in range(MAX_REQUEST_FACTOR * prompt.requests_for(request.count)):
        if len(texts) >= request.count:
            return
        reply = ask(prompt.body(client.options.model, request.values, number), number)
        if reply is None:
            return
        found = request.usable_texts(reply)
        texts.update(found)
        yield reply, found


def _tells(statement: str, answer: str) -> bool:
    more = len(_words(statement).split()) - len(_words(answer).split())
    return mentions(statement, answer) and more >= MIN_WORDS_BESIDE_ANSWER


def _words(text: str) -> str:
    """Return the words of a text in lower case, each between two spaces."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])
