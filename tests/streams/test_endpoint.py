"""The client of an endpoint: what may pass is tried again, the rest is named, all is cached."""

import re
import time
from pathlib import Path

import pytest

from tests.support.chat_server import (
    KEY_VARIABLE,
    Answer,
    chat_server,
    client_of,
    failure,
    first,
)
from titan_smf.errors import ConfigError, EndpointError
from titan_smf.streams.endpoint import EndpointOptions

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

RETRIED = {
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


@pytest.mark.parametrize("name", RETRIED)
def test_what_may_pass_is_tried_again_and_the_answer_is_kept(name: str, tmp_path: Path) -> None:
    with chat_server(first(RETRIED[name])) as server:
        client = client_of(server.url, tmp_path, timeout=1.0 if name == "slow" else 30.0)
        start = time.monotonic()
        reply = client.ask(BODY, 0)
        assert (reply.text, reply.complete) == ("Good.", True)
        assert (reply.tokens_in, reply.tokens_out) == (100, 50)
        assert server.bodies == [BODY, BODY]
        assert name != "too many requests" or time.monotonic() - start >= 0.3
        assert client.cached(BODY, 0) == reply
        assert client.cached(BODY, 1) is None
        assert client.cached({**BODY, "model": "other"}, 0) is None
        assert server.keys == ["Bearer secret-key"] * 2
    assert all("secret-key" not in path.read_text() for path in tmp_path.rglob("*.json"))


REFUSED = {
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


@pytest.mark.parametrize("name", REFUSED)
def test_what_will_not_pass_is_not_tried_again(name: str, tmp_path: Path) -> None:
    answer, message = REFUSED[name]
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
            EndpointOptions(wrong, "m")
