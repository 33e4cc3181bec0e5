"""The tool with an endpoint: the cost is agreed to, and no answer is paid for twice."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.streams.conftest import TOOL, ToolRun
from tests.support.chat_server import (
    KEY_VARIABLE,
    Answer,
    ChatServer,
    chat_server,
    completion,
    failure,
    write_statements,
)
from titan_smf.streams.records import Fact, read_records


class Questions:
    """Twelve questions, and runs of the tool that have a server write 32 statements of each."""

    def __init__(self, folder: Path, make_stream: Callable[..., ToolRun]) -> None:
        self.folder = folder
        self.output = folder / "facts.jsonl"
        self._make_stream = make_stream
        rows = [{"question": f"who is {n}?", "answer": [f"Nobody {n}"]} for n in range(12)]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, url: str, *more: str, cache: str = "cache") -> list[str]:
        paths = ["--output", str(self.output), "--cache", str(self.folder / cache)]
        options = f"--endpoint {url} --model m --key-variable {KEY_VARIABLE} --statements 32"
        return ["facts", str(self.folder / "questions.jsonl"), *paths, *options.split(), *more]

    def ask(self, url: str, *more: str, cache: str = "cache") -> ToolRun:
        return self._make_stream(*self.arguments(url, *more, cache=cache))


@pytest.fixture
def questions(tmp_path: Path, make_stream: Callable[..., ToolRun]) -> Questions:
    return Questions(tmp_path, make_stream)


def slow_statements(number: int, body: dict[str, Any]) -> Answer:
    return Answer(write_statements(number, body).content, seconds=0.1)


@contextmanager
def server_that_hangs(after: int) -> Iterator[tuple[ChatServer, threading.Event]]:
    """A server that answers no request but the first `after`, until the event is set."""
    released = threading.Event()

    def behave(number: int, body: dict[str, Any]) -> Answer:
        if number >= after:
            released.wait(30)
        return slow_statements(number, body)

    with chat_server(behave) as server:
        yield server, released


def start_tool(args: list[str], server: ChatServer, num_requests: int) -> subprocess.Popen[str]:
    """The tool in a process of its own, which has made `num_requests`."""
    tool = subprocess.Popen(
        [sys.executable, TOOL, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(server.bodies) < num_requests:
        assert tool.poll() is None
        time.sleep(0.01)
    return tool


def test_a_killed_run_goes_on_and_pays_for_no_answer_twice(questions: Questions) -> None:
    output = questions.output
    with server_that_hangs(after=9) as (server, released):
        asked = (server.url, "--yes", "--concurrency", "2")
        tool = start_tool(questions.arguments(*asked), server, 9)
        tool.kill()
        tool.communicate()
        released.set()
        assert not output.exists()
        before = len(server.bodies)
        done = questions.ask(*asked)
        assert done.code == 0, done.err
        kept = re.search(r"\((\d+) answers are kept", done.out)
        assert kept is not None, done.out
        assert before - 2 <= int(kept[1]) <= before
        distinct = {json.dumps(body) for body in server.bodies}
        assert len(distinct) == 24
        assert len(server.bodies) - 24 <= 2  # those under way when it was killed
        facts = read_records(str(output), Fact)
        assert [fact.id for fact in facts] == [str(n) for n in range(12)]
        assert all(len(set(fact.statements)) == 32 for fact in facts)
        before = len(server.bodies)
        again = questions.ask(*asked, "--overwrite")
        assert again.code == 0, again.err
        assert "0 requests to come (24 answers are kept already)" in again.out
        assert len(server.bodies) == before
        assert read_records(str(output), Fact) == facts
        # the same bytes as a run that was never killed
        resumed = output.read_bytes()
        assert questions.ask(server.url, "--yes", "--overwrite", cache="other").code == 0
        assert output.read_bytes() == resumed


def test_an_interrupted_run_says_how_to_go_on(questions: Questions) -> None:
    with server_that_hangs(after=4) as (server, released):
        tool = start_tool(questions.arguments(server.url, "--yes", "--concurrency", "2"), server, 4)
        tool.send_signal(signal.SIGINT)
        released.set()
        _, errors = tool.communicate(timeout=30)
        assert (tool.returncode, errors) == (130, "interrupted; run again to resume\n")
        assert len(server.bodies) < 12


def test_mistakes_end_with_one_message_before_anything_is_paid(questions: Questions) -> None:
    output = questions.output
    with chat_server(lambda *_: failure(401, "Bad key")) as server:
        done = questions.ask(server.url, "--price-in", "1", "--price-out", "2")
        assert done.code == 2
        assert "24 requests to come (0 answers are kept already), about " in done.out
        assert " at 1 and 2 a million" in done.out
        assert "--yes, to agree to this cost" in done.err
        assert server.bodies == []
        done = questions.ask(server.url, "--yes")
        assert done.code == 2
        assert done.err.count("\n") == 1, done.err
        assert f"status 401: Bad key; the environment variable {KEY_VARIABLE}" in done.err
        assert not output.exists()
        output.write_text("mine\n")
        num_requests = len(server.bodies)
        assert "exists; choose another" in questions.ask(server.url, "--yes").err
        assert len(server.bodies) == num_requests
        assert output.read_text() == "mine\n"


@pytest.mark.parametrize(("typed", "code", "num_requests"), [("y\n", 0, 24), ("\n", 2, 0)])
def test_at_a_terminal_the_cost_is_agreed_to(
    typed: str,
    code: int,
    num_requests: int,
    questions: Questions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keyboard, terminal = pty.openpty()
    with chat_server(write_statements) as server, os.fdopen(keyboard, "wb", 0) as typing:
        typing.write(typed.encode())
        with os.fdopen(terminal) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            done = questions.ask(server.url)
    assert done.code == code, done.err
    assert len(server.bodies) == num_requests
    assert code == 0 or "stopped; nothing was asked" in done.err


def test_one_refusal_ends_the_waits_of_all_requests(questions: Questions) -> None:
    def behave(number: int, _: dict[str, Any]) -> Answer:
        bad_key = Answer(failure(401, "Bad key").content, 401, seconds=0.5)
        return bad_key if number == 0 else failure(429, "Slow down", Retry_After="100")

    with chat_server(behave) as server:
        done = questions.ask(server.url, "--yes")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "Bad key" in done.err
        assert len(server.bodies) <= 8  # none was tried again, and no other record begun


def test_progress_is_told_while_requests_are_answered(questions: Questions) -> None:
    with chat_server(slow_statements) as server:
        done = questions.ask(server.url, "--yes", "--concurrency", "1")
    told = re.findall(
        r"^(\d+)/24 requests, [\d,]+ tokens out, 0 answers .*, \d+ s left$", done.out, re.M
    )
    assert len(told) >= 2, done.out
    assert 0 < int(told[0]) < int(told[-1]) <= 24


def test_facts_without_statements_are_left_out_and_named(questions: Questions) -> None:
    def behave(number: int, body: dict[str, Any]) -> Answer:
        prompt = body["messages"][-1]["content"]
        if "who is 3?" in prompt:
            return completion("I cannot say.")
        return completion("It is Nobody 5.") if "5?" in prompt else write_statements(number, body)

    with chat_server(behave) as server:
        done = questions.ask(server.url, "--yes")
    assert done.code == 0, done.err
    assert "left out, without any text: 1 records (3)" in done.out
    assert "fewer than 32 texts: 1 records (5)" in done.out
    assert "6 answers held nothing to use" in done.out
    facts = {fact.id: fact for fact in read_records(str(questions.output), Fact)}
    assert len(facts) == 11
    assert facts["5"].statements == ("It is Nobody 5.",)
