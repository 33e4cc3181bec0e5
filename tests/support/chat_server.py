"""A stand-in for an OpenAI-compatible chat endpoint, on a port of this machine."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from titan_smf.streams.endpoint import ChatClient, EndpointOptions

KEY_VARIABLE = "TITAN_SMF_TEST_KEY"


@dataclass(frozen=True)
class Answer:
    """What the server does with a request."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Before it answers."""
    drop: bool = False
    """Close the connection without an answer."""


Behaviour = Callable[[int, dict[str, Any]], Answer]
"""The answer to a request by its number, from 0, and its body."""


def client_of(
    url: str, cache: Path, report: Callable[[str], None] = print, **options: Any
) -> ChatClient:
    """A client that waits less than users' do."""
    options = {"tries": 4, "first_wait": 0.01, "longest_wait": 5.0, **options}
    return ChatClient(EndpointOptions(url, "m", KEY_VARIABLE, cache=str(cache), **options), report)


def first(answer: Answer, then: str = "Good.") -> Behaviour:
    """`answer` to the first request, a completion to the others."""
    return lambda number, _: answer if number == 0 else completion(then)


def completion(text: str | None, finish: str = "stop") -> Answer:
    """A chat completion as OpenAI documents it."""
    message = {"role": "assistant", "content": text, "refusal": None if text else "No."}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    content = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage}
    return Answer(json.dumps(content).encode())


def failure(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An error as OpenAI documents it; `_` in the name of a header stands for `-`."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(json.dumps({"error": error}).encode(), status, names)


def write_statements(_: int, body: dict[str, Any]) -> Answer:
    """As many numbered statements as the prompt asks for, the same for the same request."""
    prompt = body["messages"][-1]["content"]
    answer, count = re.search(r"^Answer: (.*)$", prompt, re.M), re.search(r"Write (\d+)", prompt)
    assert answer is not None, prompt
    assert count is not None, prompt
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    lines = [f"{n + 1}. It is told in {mark}-{n}: {answer[1]}." for n in range(int(count[1]))]
    return completion("Here they are.\n\n" + "\n".join(lines))


@dataclass
class ChatServer:
    """A running server, and what it was asked."""

    url: str
    bodies: list[dict[str, Any]]
    keys: list[str | None]
    """The Authorization header of each request."""


@contextmanager
def chat_server(behaviour: Behaviour) -> Iterator[ChatServer]:
    """A server that answers POST /v1/chat/completions as `behaviour` says."""
    lock = threading.Lock()
    server = ChatServer("", [], [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions", self.path
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.keys.append(self.headers["Authorization"])
            answer = behaviour(number, body)
            time.sleep(answer.seconds)
            if answer.drop:
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # the asker was killed, or waits no longer
                self.close_connection = True

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}/v1"
    threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
