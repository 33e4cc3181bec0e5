"""Chat endpoints: what may pass is tried again, nothing is paid for twice, bad answers not used."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_server import (
    Answer,
    Behaviour,
    chat_server,
    completion,
    failure,
    write_statements,
)
from titan_smf.errors import ConfigError, EndpointError
from titan_smf.streams.endpoint import ChatClient, Endpoint
from titan_smf.streams.records import Fact, read_records
from titan_smf.streams.rewriting import (
    Plan,
    load_prompt,
    mentions,
    plan,
    rewrite_wish,
    statement_wish,
    write,
)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_stream.py"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
KEY_VARIABLE = "TITAN_SMF_TEST_KEY"


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, "secret-key")


def client_of(
    url: str, cache: Path, report: Callable[[str], None] = print, **settings: Any
) -> ChatClient:
    settings = {"tries": 4, "first_wait": 0.01, "longest_wait": 5.0, **settings}
    return ChatClient(Endpoint(url, "m", KEY_VARIABLE, **settings), cache, report)


def first(answer: Answer, then: str = "Good.") -> Behaviour:
    """`answer` to the first request, a completion to the others."""
    return lambda number, _: answer if number == 0 else completion(then)


PASSING = {
    "too many requests": failure(429, "Slow down", Retry_After="0.3"),
    "server error": failure(500, "Oops"),
    "overloaded, not in JSON": Answer(b"<html>busy</html>", 503),
    "no JSON": Answer(b'{"choices": ['),
    "not UTF-8": Answer(b"\xff\xfe{}"),
    "no choices": Answer(b'{"choices": []}'),
    "no object": Answer(b"null"),
    "dropped": Answer(drop=True),
    "cut": Answer(b"{}", headers={"Content-Length": "100"}),
    "slow": Answer(b"{}", seconds=1.5),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again_and_the_answer_is_kept(name: str, tmp_path: Path) -> None:
    with chat_server(first(PASSING[name])) as server:
        client = client_of(server.url, tmp_path, timeout=1.0 if name == "slow" else 30.0)
        start = time.monotonic()
        reply = client.ask(BODY, 0)
        assert (reply.text, reply.complete) == ("Good.", True)
        assert (reply.tokens_in, reply.tokens_out) == (100, 50)
        assert server.bodies == [BODY, BODY]
        assert name != "too many requests" or time.monotonic() - start >= 0.3
        assert client.kept(BODY, 0) == reply
        assert client.kept(BODY, 1) is None
        assert client.kept({**BODY, "model": "other"}, 0) is None
        assert server.keys == ["Bearer secret-key"] * 2
    assert all("secret-key" not in path.read_text() for path in tmp_path.rglob("*.json"))


FINAL = {
    "wrong key": (failure(401, "Bad key"), f"status 401: Bad key; .* {KEY_VARIABLE}, .* not right"),
    "no model": (
        failure(404, "No model m"),
        r"status 404: No model m; check the URL, the model",
    ),
    "no credit": (
        failure(429, "Exceeded", "insufficient_quota"),
        "status 429: Exceeded insufficient_quota; the account has no credit left",
    ),
    "long wait": (failure(429, "Later", Retry_After="3600"), "asks to wait 3600 s; run again then"),
    "elsewhere": (
        Answer(status=302, headers={"Location": "http://127.0.0.1:1/"}),
        "status 302: .*; check the URL",
    ),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_will_not_pass_is_not_tried_again(name: str, tmp_path: Path) -> None:
    answer, message = FINAL[name]
    with chat_server(first(answer)) as server:
        with pytest.raises(EndpointError, match=message):
            client_of(server.url, tmp_path).ask(BODY, 0)
        assert len(server.bodies) == 1


def test_trying_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda *_: failure(500, "Oops")) as server:
        with pytest.raises(EndpointError, match=r"500: Oops, at the last of 4 tries; .* kept"):
            client_of(server.url, tmp_path).ask(BODY, 0)
        assert len(server.bodies) == 4
        url = server.url
    told: list[str] = []
    with pytest.raises(EndpointError, match=r"no answer: .*refused, at the last"):
        client_of(url, tmp_path, told.append).ask(BODY, 0)
    assert len(told) == 1, "the waits are told, but not each of them"
    assert re.fullmatch(r"no answer: .*refused; try 2 of 4 in 0 s", told[0])
    monkeypatch.delenv(KEY_VARIABLE)
    with chat_server(first(failure(401, "Who?"))) as server:
        client = client_of(server.url, tmp_path)
        for _ in range(2):  # the second is not asked
            with pytest.raises(EndpointError, match=f"{KEY_VARIABLE}, which .*, is not set"):
                client.ask(BODY, 0)
        assert client_of(server.url, tmp_path).ask(BODY, 0).text == "Good."
        assert server.keys == [None, None]
    monkeypatch.setenv(KEY_VARIABLE, "\u201ckey\u201d")
    with pytest.raises(ConfigError, match=r"\(not shown\)"):
        client_of(url, tmp_path)
    for wrong in ("api.openai.com/v1", "ftp://host/v1", "http://"):
        with pytest.raises(ConfigError, match="endpoint: got"):
            Endpoint(wrong, "m")


def test_a_broken_kept_answer_is_asked_for_again(tmp_path: Path) -> None:
    with chat_server(first(completion("Good."))) as server:
        client = client_of(server.url, tmp_path)
        client.ask(BODY, 0)
        (kept,) = tmp_path.rglob("*.json")
        kept.write_bytes(kept.read_bytes()[:50])
        assert client.kept(BODY, 0) is None


def test_the_plan_is_what_is_asked_and_every_statement_has_the_answer(tmp_path: Path) -> None:
    prompt = load_prompt("facts")
    wishes = [statement_wish(f"who is {n}?", (f"Nobody {n}", "X"), 40) for n in range(5)]
    with chat_server(write_statements) as server:
        planned = plan(client_of(server.url, tmp_path), prompt, wishes)
        assert (planned.requests, planned.kept) == (5 * 3, 0)
        assert "about 0.05 at 1 and 2 a million" not in planned.describe(0, 0)
        client = client_of(server.url, tmp_path)
        texts, outcome = write(client, prompt, wishes, planned, 3, lambda _: None)
        assert len(server.bodies) == outcome.requests == planned.requests
        assert (outcome.tokens_in, outcome.tokens_out, outcome.unused) == (1500, 750, 0)
        for number, statements in enumerate(texts):
            assert len(set(statements)) == 40
            assert all(f"Nobody {number}" in statement for statement in statements)
            assert not any(statement[0].isdigit() for statement in statements)
        # all of it is kept, and what is wanted beyond it is all that is asked for
        more = [statement_wish(f"who is {n}?", (f"Nobody {n}", "X"), 64) for n in range(5)]
        for wanted, requests in ((wishes, 0), (more, 5)):
            planned = plan(client_of(server.url, tmp_path), prompt, wanted)
            assert (planned.requests, planned.kept) == (requests, 15)
            client = client_of(server.url, tmp_path)
            assert write(client, prompt, wanted, planned, 3, lambda _: None)[1].requests == requests


BAD_STATEMENTS = {
    "refused": completion(None),
    "filtered": completion("The answer is Rome.", "content_filter"),
    "empty": completion(" \n"),
    "without the answer": completion("It is a city.\nRomeo lives there."),
    "only the answer": completion("Rome!\nAnswer: Rome"),
    "a question": completion("Is it Rome?"),
    "cut": completion("The answer is Rome", "length"),
    "said before": completion("It is Rome."),
    "half a character": completion("The \ud800 of Rom."),
}


@pytest.mark.parametrize("name", BAD_STATEMENTS)
def test_answers_that_cannot_be_used_are_asked_for_again(name: str, tmp_path: Path) -> None:
    prompt = load_prompt("facts")
    answers = {
        0: completion("- It is Rome.\n* \u201cROME\u201d, says he."),
        1: BAD_STATEMENTS[name],
    }
    wish = statement_wish("which city?", ("Rome",), 17)  # two requests, six at most

    def behave(number: int, _: dict[str, Any]) -> Answer:
        return answers.get(number, completion("In Rome it is."))

    with chat_server(behave) as server:
        client = client_of(server.url, tmp_path)
        (texts,), outcome = write(client, prompt, [wish], Plan(), 1, lambda _: None)
        assert texts == ("It is Rome.", "\u201cROME\u201d, says he.", "In Rome it is.")
        assert outcome.requests == len(server.bodies) == 6
        assert outcome.unused == (name != "said before")
        styles = {body["messages"][1]["content"] for body in server.bodies}
        assert len(styles) == 6  # another style each time
        planned = plan(client_of(server.url, tmp_path), prompt, [wish])
        assert (planned.requests, planned.kept) == (0, 6)


def test_rewrites_are_of_the_chunk(tmp_path: Path) -> None:
    chunk = "The bridge of Avonlea was built in 1873 by Martha Jones. It has 12 arches."
    good = "In 1873, Martha Jones built the bridge of Avonlea, with its 12 arches."
    bad = [
        completion("I cannot help with that, but here is a thought about bridges."),
        completion("Avonlea 1873."),
        completion(good * 5),
        completion(good[:40], "length"),
        completion(chunk + "\n"),
    ]
    for number, answer in enumerate(bad):
        cache = tmp_path / str(number)
        with chat_server(first(answer, good)) as server:
            client = client_of(server.url, cache)
            wish = rewrite_wish(chunk, 1)
            prompt = load_prompt("documents")
            (texts,), outcome = write(client, prompt, [wish], Plan(), 1, lambda _: None)
            assert (texts, outcome.unused) == ((good,), 1)


def test_an_answer_is_found_whatever_its_case_and_signs() -> None:
    assert mentions("It was the U.S.S.R., they say.", "u.s.s.r.")
    assert mentions("From 1,020\u20131,080 kg", "1,020\u20131,080 kg")
    assert not mentions("It was Romeo.", "Rome")
    assert mentions("They call it C++.", "++")


def run_tool(*args: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    settings = {"stdin": subprocess.DEVNULL, "timeout": 60, **settings}
    command = [sys.executable, str(TOOL), *args]
    return subprocess.run(command, capture_output=True, text=True, **settings)


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments that ask a server about some questions."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"who is {n}?", "answer": [f"Nobody {n}"]} for n in range(12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(url: str, *more: str, cache: str = "cache") -> list[str]:
        options = f"--endpoint {url} --model m --key-variable {KEY_VARIABLE} --statements 32"
        paths = ["--output", str(tmp_path / "facts.jsonl"), "--cache", str(tmp_path / cache)]
        return ["facts", str(questions), *paths, *options.split(), *more]

    return arguments


def test_a_killed_run_goes_on_and_pays_for_no_answer_twice(
    asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    killed = threading.Event()

    def slowly(number: int, body: dict[str, Any]) -> Answer:
        if number >= 9:
            killed.wait(30)
        return Answer(write_statements(number, body).content, seconds=0.1)

    output = tmp_path / "facts.jsonl"
    with chat_server(slowly) as server:
        arguments = asked(server.url, "--yes", "--concurrency", "2")
        tool = subprocess.Popen([sys.executable, str(TOOL), *arguments], stdout=subprocess.DEVNULL)
        while len(server.bodies) < 9:
            assert tool.poll() is None
            time.sleep(0.01)
        tool.send_signal(signal.SIGKILL)
        tool.wait()
        killed.set()
        assert not output.exists()
        before = len(server.bodies)
        done = run_tool(*arguments)
        assert done.returncode == 0, done.stderr
        kept = re.search(r"\((\d+) answers are kept", done.stdout)
        assert kept is not None, done.stdout
        assert before - 2 <= int(kept[1]) <= before
        distinct = {json.dumps(body) for body in server.bodies}
        assert len(distinct) == 24
        assert len(server.bodies) - 24 <= 2  # those under way when it was killed
        facts = read_records(str(output), Fact)
        assert [fact.id for fact in facts] == [str(n) for n in range(12)]
        assert all(len(set(fact.statements)) == 32 for fact in facts)
        before = len(server.bodies)
        again = run_tool(*arguments, "--overwrite")
        assert again.returncode == 0, again.stderr
        assert "0 requests to come (24 answers are kept already)" in again.stdout
        assert len(server.bodies) == before
        assert read_records(str(output), Fact) == facts
        # the same bytes as a run that was never killed
        resumed = output.read_bytes()
        arguments = asked(server.url, "--yes", "--overwrite", cache="other")
        assert run_tool(*arguments).returncode == 0
        assert output.read_bytes() == resumed


def test_mistakes_end_with_one_message_before_anything_is_paid(
    asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "facts.jsonl"
    with chat_server(lambda *_: failure(401, "Bad key")) as server:
        done = run_tool(*asked(server.url, "--price-in", "1", "--price-out", "2"))
        assert done.returncode == 2
        assert "24 requests to come (0 answers are kept already), about " in done.stdout
        assert " at 1 and 2 a million" in done.stdout
        assert "--yes, to agree to this cost" in done.stderr
        assert server.bodies == []
        done = run_tool(*asked(server.url, "--yes"))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"status 401: Bad key; the environment variable {KEY_VARIABLE}" in done.stderr
        assert not output.exists()
        output.write_text("mine\n")
        num_requests = len(server.bodies)
        assert "exists; choose another" in run_tool(*asked(server.url, "--yes")).stderr
        assert len(server.bodies) == num_requests
        assert output.read_text() == "mine\n"


@pytest.mark.parametrize(("typed", "code", "num_requests"), [("y\n", 0, 24), ("\n", 2, 0)])
def test_at_a_terminal_the_cost_is_agreed_to(
    typed: str, code: int, num_requests: int, asked: Callable[..., list[str]]
) -> None:
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, typed.encode())
        with chat_server(write_statements) as server:
            done = run_tool(*asked(server.url), stdin=terminal)
            assert done.returncode == code, done.stderr
            assert len(server.bodies) == num_requests
            assert code == 0 or "stopped; nothing was asked" in done.stderr
    finally:
        os.close(keyboard)
        os.close(terminal)


def test_one_refusal_ends_the_waits_of_all_requests(asked: Callable[..., list[str]]) -> None:
    def behave(number: int, _: dict[str, Any]) -> Answer:
        bad_key = Answer(failure(401, "Bad key").content, 401, seconds=0.5)
        return bad_key if number == 0 else failure(429, "Slow down", Retry_After="100")

    with chat_server(behave) as server:
        done = run_tool(*asked(server.url, "--yes"))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "Bad key" in done.stderr
        assert len(server.bodies) <= 8  # none was tried again, and no other record begun


def test_progress_is_told_while_requests_are_answered(asked: Callable[..., list[str]]) -> None:
    def slowly(number: int, body: dict[str, Any]) -> Answer:
        return Answer(write_statements(number, body).content, seconds=0.2)

    with chat_server(slowly) as server:
        done = run_tool(*asked(server.url, "--yes", "--concurrency", "2"))
    told = re.findall(
        r"^(\d+)/24 requests, \d+ tokens out, 0 answers .*, \d+ s left$", done.stdout, re.M
    )
    assert len(told) >= 2, done.stdout
    assert 0 < int(told[0]) < int(told[-1]) <= 24


def test_an_interrupted_run_says_how_to_go_on(asked: Callable[..., list[str]]) -> None:
    interrupted = threading.Event()

    def slowly(number: int, body: dict[str, Any]) -> Answer:
        if number >= 4:
            interrupted.wait(30)
        return Answer(write_statements(number, body).content, seconds=0.2)

    with chat_server(slowly) as server:
        command = [sys.executable, str(TOOL), *asked(server.url, "--yes", "--concurrency", "2")]
        tool = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs ignore SIGINT, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while len(server.bodies) < 4:
            assert tool.poll() is None
            time.sleep(0.01)
        tool.send_signal(signal.SIGINT)
        interrupted.set()
        _, errors = tool.communicate(timeout=30)
        assert (tool.returncode, errors) == (130, "interrupted; run again to resume\n")
        assert len(server.bodies) < 12


def test_facts_without_statements_are_left_out_and_named(
    asked: Callable[..., list[str]], tmp_path: Path
) -> None:
    def behave(number: int, body: dict[str, Any]) -> Answer:
        prompt = body["messages"][-1]["content"]
        if "who is 3?" in prompt:
            return completion("I cannot say.")
        return completion("It is Nobody 5.") if "5?" in prompt else write_statements(number, body)

    with chat_server(behave) as server:
        done = run_tool(*asked(server.url, "--yes"))
    assert done.returncode == 0, done.stderr
    assert "left out, without any text: 1 records (3)" in done.stdout
    assert "fewer than 32 texts: 1 records (5)" in done.stdout
    assert "6 answers held nothing to use" in done.stdout
    facts = {fact.id: fact for fact in read_records(str(tmp_path / "facts.jsonl"), Fact)}
    assert len(facts) == 11
    assert facts["5"].statements == ("It is Nobody 5.",)


PROMPTS = {
    "not there": ("", "a TOML file"),
    "not TOML": ("[facts", "a TOML file"),
    "no table": ("[documents]\n", r"facts: got None; allowed: a table with system \(str\)"),
    "no answer in it": (
        '[facts]\nsystem=""\nuser="{question}"\nstyles=["a"]\nper_request=1\n[facts.request]\n',
        r"facts.user: got '\{question\}'; allowed: with \{answer\}",
    ),
    "no style": (
        '[facts]\nsystem=""\nuser="{question}{answer}"\nstyles=[]\nper_request=1\n[facts.request]\n',
        "at least one style",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_cannot_be_used_are_named(name: str, tmp_path: Path) -> None:
    content, message = PROMPTS[name]
    path = tmp_path / "prompts.toml"
    if content:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_prompt("facts", str(path))
