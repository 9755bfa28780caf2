"""A chat endpoint on the loopback that answers as told, misbehaves as told, and remembers every request."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from wsae.evals.config import LlmConfig

KEY = "sk-very-secret-0123456789"


@dataclass
class Reply:
    """What goes back: a status, headers and a body; or nothing at all (`close`), or nothing in time (`delay`)."""

    body: str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    delay: float = 0.0
    close: bool = False


def said(text: object, **more: Any) -> Reply:
    """Return a well-formed completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    body = {
        "object": "chat.completion",
        "choices": [{**choice, **more}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }
    return Reply(json.dumps(body))


def error(status: int, message: str = "", **headers: str) -> Reply:
    """Return an error in the usual form."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"error": {"message": message}}) if message else ""
    return Reply(body, status, {"content-type": "application/json", **names})


Answering = Callable[[dict[str, Any], int], Reply]
"""The request's body and how often this very body has come before -> what to answer."""


class Server(ThreadingHTTPServer):
    """Takes many connections at once: a full queue would cost clients seconds."""

    daemon_threads = True
    request_queue_size = 128


class Chat:
    """The server: its address, and the bodies, headers and arrival times of all requests."""

    def __init__(self, answering: Answering) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = self._now = 0
        self._answering = answering
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                chat.handle(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        body = json.loads(raw)
        with self._lock:
            before = self.bodies.count(body)
            self.bodies.append(body)
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            known = handler.path == "/v1/chat/completions"
            reply = self._answering(body, before) if known else error(404)
            self.stopping.wait(reply.delay)
            if not reply.close and not self.stopping.is_set():
                send(handler, reply)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should
        finally:
            with self._lock:
                self._now -= 1

    def repeated(self) -> int:
        """Return how many requests had come before."""
        texts = [json.dumps(body, sort_keys=True) for body in self.bodies]
        return len(texts) - len(set(texts))


def send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    data = reply.body.encode() if isinstance(reply.body, str) else reply.body
    handler.send_response(reply.status)
    for name, value in reply.headers.items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@contextlib.contextmanager
def serving(answering: Answering) -> Iterator[Chat]:
    """Run a server while the block runs."""
    chat = Chat(answering)
    thread = threading.Thread(target=chat.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield chat
    finally:
        chat.stopping.set()
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()


def config(chat: Chat, cache: Path, **more: Any) -> LlmConfig:
    """Return settings for the server that wait little."""
    quick = {
        "timeout_s": 20.0,
        "retries": 3,
        "backoff_s": 0.01,
        "max_wait_s": 3.0,
        "key_env": "WSAE_TEST_KEY",
    }
    return LlmConfig(endpoint=chat.url, model="mock", cache=str(cache), **{**quick, **more})


def prompt(body: dict[str, Any]) -> str:
    """Return what the user said last."""
    return body["messages"][-1]["content"]
