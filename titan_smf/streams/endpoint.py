"""Requests to an OpenAI-compatible chat endpoint: retried, and each answer kept on disk.

An answer is stored under the hash of its request (model, messages, settings) before it is used, so
that no answer is paid for twice, however often the program is killed and started again. What may
pass (no connection, 408, 409, 425, 429, 5xx, an answer that is no JSON) is tried again after a
wait that doubles, or that the server asks for; what will not pass (a wrong key, an unknown model)
ends it with one message.
"""

import email.utils
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_smf import storage
from titan_smf.data.fields import excerpt
from titan_smf.errors import ConfigError, EndpointError

PASSING = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
SECONDS_BETWEEN_LINES = 5.0
"""About tries that failed: many requests may wait at once."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently."""

    url: str
    """Up to `/v1`, or the whole of `.../chat/completions`."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; without it none is sent."""
    timeout: float = 120.0
    """Seconds without a byte after which a try has failed."""
    tries: int = 6
    first_wait: float = 1.0
    """Seconds before the second try; doubled from try to try."""
    longest_wait: float = 120.0
    """Seconds; a server that asks for more is not waited for."""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError("endpoint", self.url, "a URL such as https://api.openai.com/v1")
        if not self.model:
            raise ConfigError("model", self.model, "the name under which the endpoint has a model")


@dataclass(frozen=True)
class Reply:
    """What a model answered."""

    text: str
    """Empty if it refused."""
    complete: bool
    """Not cut at the largest number of tokens."""
    tokens_in: int
    tokens_out: int


class ChatClient:
    """Asks one endpoint; many threads may use it at once.

    Args:
        endpoint: where to ask.
        cache: the folder of the kept answers.
        report: called with a line about a try that failed, now and then.
    """

    def __init__(self, endpoint: Endpoint, cache: Path, report: Callable[[str], None]) -> None:
        self.endpoint = endpoint
        self._report = report
        self._reported = -SECONDS_BETWEEN_LINES
        self._stopped = threading.Event()
        self._failure = f"{endpoint.url}: stopped"
        if not os.environ.get(endpoint.key_variable, "").strip().isascii():
            raise ConfigError(endpoint.key_variable, "(not shown)", "a key of ASCII characters")
        base = endpoint.url.rstrip("/")
        self._url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self._cache = cache
        self._opener = urllib.request.build_opener(_NoRedirect)

    def body(self, messages: list[dict[str, str]], settings: dict[str, Any]) -> dict[str, Any]:
        """The request for `messages`."""
        return {**settings, "model": self.endpoint.model, "messages": messages}

    def kept(self, body: dict[str, Any], number: int) -> Reply | None:
        """The kept answer to a request, if there is one. `number` tells equal requests apart."""
        try:
            return _reply(json.loads(self._file(body, number).read_bytes())["response"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def ask(self, body: dict[str, Any], number: int) -> Reply:
        """The answer to a request, kept from now on.

        Raises:
            EndpointError: this request or one before it was refused, or no try brought an answer.
        """
        failure, wait = "", self.endpoint.first_wait
        for attempt in range(self.endpoint.tries):
            if attempt:
                self._tell(f"{failure}; try {attempt + 1} of {self.endpoint.tries} in {wait:.0f} s")
                self._stopped.wait(wait)
                wait = min(2 * wait, self.endpoint.longest_wait)
            if self._stopped.is_set():
                raise EndpointError(self._failure)
            try:
                response = self._post(body)
                reply = _reply(response)
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {_message(error)}"
                asked = _retry_after(error.headers)
                self._check_passing(error.code, failure, asked)
                wait = max(wait, asked)
            except (OSError, http.client.HTTPException) as error:
                failure = f"no answer: {getattr(error, 'reason', None) or error or repr(error)}"
            except (ValueError, LookupError, TypeError) as error:
                failure = f"an answer that is no chat completion: {error}"
            else:
                kept = json.dumps({"request": body, "response": response})
                storage.write_bytes(str(self._file(body, number)), kept.encode())
                return reply
        raise self._failed(
            f"{failure}, at the last of {self.endpoint.tries} tries; the answers "
            "so far are kept, run again to go on"
        )

    def stop(self) -> None:
        """End all waits between tries; nothing more is asked, and every request raises."""
        self._stopped.set()

    def _tell(self, line: str) -> None:
        """Report that a request waits, unless another one's wait was reported just now."""
        now = time.monotonic()
        if now - self._reported >= SECONDS_BETWEEN_LINES:
            self._reported = now
            self._report(line)

    def _failed(self, why: str) -> EndpointError:
        """The error of a request, and from now on of all others: none would fare better."""
        self._failure = f"{self._url}: {why}"
        self._stopped.set()
        return EndpointError(self._failure)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.endpoint.key_variable, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.endpoint.timeout) as response:
            return json.load(response)

    def _check_passing(self, status: int, failure: str, asked: float) -> None:
        """Raise if trying again is no use."""
        variable = self.endpoint.key_variable
        advice = ""
        if status in (401, 403):
            state = "is not right for it" if os.environ.get(variable) else "is not set"
            advice = f"the environment variable {variable}, which holds the key, {state}"
        elif "insufficient_quota" in failure or status == 402:
            advice = "the account has no credit left; run again to go on when it has"
        elif status < 500 and status not in PASSING:
            advice = f"check the URL, the model ({self.endpoint.model}) and the prompts' settings"
        elif asked > self.endpoint.longest_wait:
            advice = f"the server asks to wait {asked:.0f} s; run again then to go on"
        if advice:
            raise self._failed(f"{failure}; {advice}")

    def _file(self, body: dict[str, Any], number: int) -> Path:
        key = storage.sha256_hex(json.dumps([body, number], sort_keys=True).encode(), digits=40)
        return self._cache / key[:2] / f"{key}.json"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers that point elsewhere are failures: the key must not follow them."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _reply(response: Any) -> Reply:
    """The answer in a response; ValueError, LookupError or TypeError if there is none."""
    choice = response["choices"][0]
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise ValueError(f"content is {excerpt(text)}")
    usage = response.get("usage") or {}
    finish = choice.get("finish_reason")
    return Reply(
        "" if finish == "content_filter" else text.encode(errors="replace").decode(),
        finish != "length",
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says about an error, on one line."""
    try:
        with error:
            content = error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        told = json.loads(content)["error"]
        content = told if isinstance(told, str) else f"{told['message']} {told.get('code') or ''}"
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(content.split())[:200] or str(error.reason)


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, given as such or as a date; 0 if it does not."""
    given = headers.get("Retry-After") or ""
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    except ValueError:
        return 0.0
