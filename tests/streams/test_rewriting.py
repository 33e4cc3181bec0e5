"""Texts from an endpoint: as many as expected are asked for, bad ones are not used,"""

from pathlib import Path

import pytest

from tests.support.chat_server import (
    chat_server,
    client_of,
    completion,
    first,
    write_statements,
)
from titan_smf.errors import ConfigError
from titan_smf.streams.rewriting import (
    RewriteRequest,
    estimate,
    load_prompt,
    mentions,
    rewrite_request,
    statement_request,
    write_texts,
)


def test_the_estimate_is_what_is_asked_and_every_statement_has_the_answer(tmp_path: Path) -> None:
    prompt = load_prompt("facts")

    def requests(count: int) -> list[RewriteRequest]:
        return [statement_request(f"who is {n}?", (f"Nobody {n}", "X"), count) for n in range(5)]

    with chat_server(write_statements) as server:
        client = client_of(server.url, tmp_path, concurrency=3)
        expected = estimate(client, prompt, requests(40))
        assert (expected.requests, expected.cached) == (5 * 3, 0)
        assert "about 0.05 at 1 and 2 a million" not in expected.describe_estimate(0, 0)
        texts, usage = write_texts(client, prompt, requests(40), print, expected.requests)
        assert len(server.bodies) == usage.requests == expected.requests
        assert (usage.tokens_in, usage.tokens_out, usage.unused) == (1500, 750, 0)
        for number, statements in enumerate(texts):
            assert len(set(statements)) == 40
            assert all(f"Nobody {number}" in statement for statement in statements)
            assert not any(statement[0].isdigit() for statement in statements)
        # all of it is cached, and what is wanted beyond it is all that is asked for
        for count, missing in ((40, 0), (64, 5)):
            client = client_of(server.url, tmp_path)
            expected = estimate(client, prompt, requests(count))
            assert (expected.requests, expected.cached) == (missing, 15)
            _, usage = write_texts(client, prompt, requests(count), print, missing)
            assert usage.requests == missing
        assert len(server.bodies) == 20


def test_only_a_broken_answer_of_the_cache_is_asked_for_again(tmp_path: Path) -> None:
    prompt, request = load_prompt("facts"), statement_request("who?", ("Nobody",), 48)
    with chat_server(write_statements) as server:
        client = client_of(server.url, tmp_path)
        before, _ = write_texts(client, prompt, [request], print, 3)
        first_answer = min(tmp_path.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        first_answer.write_bytes(first_answer.read_bytes()[:50])
        texts, usage = write_texts(client, prompt, [request], print, 3)
        assert texts == before
        assert usage.requests == 1


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
    good = completion("- It is Rome.\n* \u201cROME\u201d, says he.")
    answers = [good, BAD_STATEMENTS[name], *[completion("In Rome it is.")] * 4]
    request = statement_request("which city?", ("Rome",), 17)  # two requests, six at most

    with chat_server(lambda number, _: answers[number]) as server:
        client = client_of(server.url, tmp_path)
        (texts,), usage = write_texts(client, prompt, [request], print, 0)
        assert texts == ("It is Rome.", "\u201cROME\u201d, says he.", "In Rome it is.")
        assert usage.requests == len(server.bodies) == 6
        assert usage.unused == (name != "said before")
        styles = {body["messages"][1]["content"] for body in server.bodies}
        assert len(styles) == 6  # another style each time
        expected = estimate(client_of(server.url, tmp_path), prompt, [request])
        assert (expected.requests, expected.cached) == (0, 6)


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
    prompt, request = load_prompt("documents"), rewrite_request(chunk, 1)
    for number, answer in enumerate(bad):
        with chat_server(first(answer, good)) as server:
            client = client_of(server.url, tmp_path / str(number))
            (texts,), usage = write_texts(client, prompt, [request], print, 0)
            assert (texts, usage.unused) == ((good,), 1)


def test_an_answer_is_found_whatever_its_case_and_signs() -> None:
    assert mentions("It was the U.S.S.R., they say.", "u.s.s.r.")
    assert mentions("From 1,020\u20131,080 kg", "1,020\u20131,080 kg")
    assert not mentions("It was Romeo.", "Rome")
    assert mentions("They call it C++.", "++")


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
