"""A client for OpenAI-compatible chat endpoints that retries, and caches each answer on disk.

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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from titan_smf import storage
from titan_smf.data.fields import excerpt
from titan_smf.errors import ConfigError, EndpointError

RETRIED = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
SECONDS_BETWEEN_LINES = 5.0
"""About failed tries: many requests may wait at once."""


@dataclass(frozen=True)
class EndpointOptions:
    """Where and how to ask for texts."""

    url: str
    """Up to `/v1`, or the whole of `.../chat/completions`."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; without it none is sent."""
    prompts: str = ""
    """A TOML file; empty for the package's."""
    cache: str = ""
    """The folder of the cached answers; empty for one in the user's cache."""
    concurrency: int = 8
    """Records that are asked for at once."""
    price_in: float = 0.0
    """For a million tokens; 0 if not known."""
    price_out: float = 0.0
    agreed: bool = False
    """Whether the cost is agreed to; otherwise the user is asked before the first request."""
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
        if self.concurrency < 1:
            raise ConfigError("concurrency", self.concurrency, "1 or more")


@dataclass(frozen=True)
class Reply:
    """A model's answer."""

    text: str
    """Empty if it refused."""
    complete: bool
    """Not cut at the largest number of tokens."""
    tokens_in: int
    tokens_out: int
    cached: bool = field(default=False, compare=False)
    """Whether it is from the cache, and so costs nothing."""


class ChatClient:
    """Asks one endpoint; many threads may use it at once.

    Args:
        options: where and how to ask.
        report: called with a line about a failed try, now and then.
    """

    def __init__(self, options: EndpointOptions, report: Callable[[str], None]) -> None:
        self.options = options
        self._report = report
        self._reported = -SECONDS_BETWEEN_LINES
        self._stopped = threading.Event()
        self._failure = f"{options.url}: stopped"
        self._key = os.environ.get(options.key_variable, "").strip()
        if not self._key.isascii():
            raise ConfigError(options.key_variable, "(not shown)", "a key of ASCII characters")
        self._url = options.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        default_cache = storage.default_cache_dir() / "endpoint"
        self._cache = Path(options.cache) if options.cache else default_cache
        self._opener = urllib.request.build_opener(_NoRedirect)

    def cached(self, body: dict[str, Any], number: int) -> Reply | None:
        """Return the cached answer to a request, if any; `number` tells equal requests apart."""
        try:
            response = json.loads(self._file(body, number).read_bytes())["response"]
            return replace(_parse_response(response), cached=True)
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def ask(self, body: dict[str, Any], number: int) -> Reply:
        """Return the answer to a request, from the cache or else from the endpoint.

        Raises:
            EndpointError: this request or one before it was refused, or no try brought an answer.
        """
        if reply := self.cached(body, number):
            return reply
        failure, wait = "", self.options.first_wait
        for attempt in range(self.options.tries):
            if attempt:
                self._tell(f"{failure}; try {attempt + 1} of {self.options.tries} in {wait:.0f} s")
                self._stopped.wait(wait)
                wait = min(2 * wait, self.options.longest_wait)
            if self._stopped.is_set():
                raise EndpointError(self._failure)
            try:
                response = self._post(body)
                reply = _parse_response(response)
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {_error_message(error)}"
                requested = _retry_after(error.headers.get("Retry-After", ""))
                if advice := self._advice(error.code, failure, requested):
                    raise self._failed(f"{failure}; {advice}") from error
                wait = max(wait, requested)
            except (OSError, http.client.HTTPException) as error:
                failure = f"no answer: {getattr(error, 'reason', None) or error or repr(error)}"
            except (ValueError, LookupError, TypeError) as error:
                failure = f"an answer that is no chat completion: {error}"
            else:
                content = json.dumps({"request": body, "response": response})
                storage.write_bytes(str(self._file(body, number)), content.encode())
                return reply
        raise self._failed(
            f"{failure}, at the last of {self.options.tries} tries; the answers "
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
        """Return the error of a request, which all others raise from now on: none would succeed."""
        self._failure = f"{self._url}: {why}"
        self._stopped.set()
        return EndpointError(self._failure)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.options.timeout) as response:
            return json.load(response)

    def _advice(self, status: int, failure: str, requested: float) -> str:
        """Return what to do about a failure if trying again is no use, else nothing."""
        if status in (401, 403):
            state = "is not right for it" if self._key else "is not set"
            variable = self.options.key_variable
            return f"the environment variable {variable}, which holds the key, {state}"
        if "insufficient_quota" in failure or status == 402:
            return "the account has no credit left; run again to go on when it has"
        if status < 500 and status not in RETRIED:
            return f"check the URL, the model ({self.options.model}) and the prompts' settings"
        if requested > self.options.longest_wait:
            return f"the server asks to wait {requested:.0f} s; run again then to go on"
        return ""

    def _file(self, body: dict[str, Any], number: int) -> Path:
        key = storage.sha256_hex(json.dumps([body, number], sort_keys=True).encode(), digits=40)
        return self._cache / key[:2] / f"{key}.json"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes redirects failures: the key must not follow them."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _parse_response(response: Any) -> Reply:
    """Return the answer in a response; ValueError, LookupError or TypeError if there is none."""
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


def _error_message(error: urllib.error.HTTPError) -> str:
    """Return what the server says about an error, on one line."""
    content = ""
    with suppress(OSError, http.client.HTTPException), error:
        content = error.read(2000).decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):
        told = json.loads(content)["error"]
        content = told if isinstance(told, str) else f"{told['message']} {told.get('code') or ''}"
    return " ".join(content.split())[:200] or str(error.reason)


def _retry_after(given: str) -> float:
    """Return the seconds that a server asks to wait, as a number or a date; 0 if it does not."""
    with suppress(ValueError):
        return max(0.0, float(given))
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return 0.0
