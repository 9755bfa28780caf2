"""A Neuronpedia on the loopback: its rules for what is uploaded, its habits, and faults as told.

What it checks is what the site's own route checks. Like the site it adds the contexts of a latent that is sent twice a
second time, and does nothing of a batch of which it refuses a part.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from interpret_server import Reply, Server, send

KEY = "np-very-secret-0123456789"


@dataclass
class Fault:
    """What goes wrong with one request: a reply instead of the right one, and whether the request was carried out."""

    reply: Reply | None = None
    done: bool = False
    cut: bool = False
    """Break off in the midst of the answer."""


Faulty = Callable[[str, int], Fault | None]
"""The request's path after /api/ and how many came before -> what goes wrong."""


@dataclass
class Site:
    """The server, and what it holds."""

    faulty: Faulty = lambda path, n: None  # noqa: ARG005
    layers: int = 3
    sets: dict[str, list[str]] = field(default_factory=dict)
    latents: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        site, self.stopping, self._lock = self, threading.Event(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.handle(self, None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                site.handle(self, json.loads(raw))

            def log_message(self, *args: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        path = handler.path.removeprefix("/api/")
        with self._lock:
            fault = self.faulty(path, len(self.paths)) or Fault(done=True)
            self.paths.append(path)
            wrong_key = handler.headers["x-api-key"] != KEY
            right = error(401, f"no such key: {handler.headers['x-api-key']}")
            if fault.done and not wrong_key:
                right = self.answer(path, body)
        reply = fault.reply or right
        try:
            self.stopping.wait(reply.delay)
            if fault.cut:
                handler.send_response(reply.status)
                handler.send_header("content-length", str(len(reply.body) + 50))
                handler.end_headers()
                handler.wfile.write(str(reply.body).encode())
            elif not reply.close and not self.stopping.is_set():
                send(handler, reply)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def answer(self, path: str, body: dict[str, Any] | None) -> Reply:
        what, *rest = path.split("/")
        if path == "feature/upload-batch":
            return self.upload(body or {})
        if path == "source-set/new":
            assert body is not None
            if body["modelId"] != "tiny":
                return error(400, "Model not found")
            assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", body["name"])
            assert len(body["description"]) < 128
            assert body["name"] not in self.sets, "made twice"
            self.sets[body["name"]] = [f"{i}-{body['name']}" for i in range(self.layers)]
        if what == "source-set":
            name = rest[1] if rest[0] == "tiny" else (body or {}).get("name")
            sources = self.sets.get(str(name))
            of_model = {"modelId": "tiny", "setName": name}
            told = sources and {
                **{"name": name, "modelId": "tiny", "description": "", "urls": []},
                "sources": [{"id": source, **of_model} for source in sources],
            }
            return Reply(json.dumps(told))
        if what == "feature" and (rest[1], int(rest[2])) in self.latents:
            return Reply(json.dumps(self.latents[rest[1], int(rest[2])]))
        return error(404, "Not found")

    def upload(self, body: dict[str, Any]) -> Reply:
        self.bodies.append(body)
        source, features = body["source"], body["features"]
        if wrong := next(iter(faults(features)), None):
            return error(400, wrong)
        if body["modelId"] != "tiny" or source not in sum(self.sets.values(), []):
            return error(500, "Something went wrong on our end.")
        for feature in features:
            known = {"activations": [], "explanations": [], "index": str(feature["index"])}
            entry = self.latents.setdefault((source, feature["index"]), known)
            entry["activations"] += feature["activations"]
            entry["explanations"] += feature["explanations"]
        return Reply(json.dumps({"message": f"{len(features)} features created."}))


def faults(features: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what the site's schema has against a batch."""
    if not 1 <= len(features) <= 128:
        yield "features field must have at most 128 items"
    if len({feature["index"] for feature in features}) < len(features):
        yield "All indexes must be unique."
    for feature in features:
        logits = feature["topLogits"], feature["bottomLogits"]
        rules = {
            "density": 0 <= feature["density"] <= 1,
            "logits": all(len(some) <= 20 and all(x["token"] for x in some) for some in logits),
            "explanations": all(map(is_explanation, feature["explanations"])),
            "activations": bool(feature["activations"]),
            "tokens": all(map(is_context, feature["activations"])),
        }
        yield from (name for name, kept in rules.items() if not kept)


def is_explanation(said: dict[str, Any]) -> bool:
    """Return whether an explanation is short enough, and made in no way that the site does not know."""
    return 1 <= len(said["text"].encode("utf-16-le")) // 2 <= 512 and not said["methodName"]


def is_context(context: dict[str, Any]) -> bool:
    """Return whether the site and its database take a context."""
    tokens, fraction = context["tokens"], context["quantileFraction"]
    fits = 1 <= len(tokens) <= 1024 and len(tokens) == len(context["values"])
    share = fraction is None or 0 <= fraction <= 1
    return fits and share and all(tokens) and "\0" not in "".join(tokens)


def error(status: int, message: str, **headers: str) -> Reply:
    """Return a refusal in the site's form."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"error": message, "message": message})
    return Reply(body, status, {"content-type": "application/json", **names})
