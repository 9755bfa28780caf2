"""The little of the model hub's protocol that pushing and loading use, on a loopback port: repositories in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repos` {name: {path: bytes}}, `created` what was asked of each, `tokens` every authorisation seen.

    Of the paths in `flipped` the last byte is sent with a bit turned; of the owners in `instead` this status and body.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict] = {}
        self.tokens: set[str | None] = set()
        self.fetched: list[str] = []
        self.flipped: set[str] = set()
        self.instead: dict[str, tuple[int, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("authorization"))
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if parts[2] in self.server.instead:
            return self._instead(parts[2])
        if parts[4] == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            return self._json({"files": modes})
        if parts[4] == "commit":
            return self._commit(repo, body)
        return self._json({}, 404)

    def _create(self, asked: dict) -> None:
        owner = asked.get("organization") or "somebody"
        name = f"{owner}/{asked['name']}"
        self.server.created[name] = asked
        self.server.repos.setdefault(name, {})
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        self._json({"success": True, "commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def do_HEAD(self) -> None:
        self._get(False)

    def do_GET(self) -> None:
        self._get(True)

    def _get(self, body: bool) -> None:
        self.server.tokens.add(self.headers.get("authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            if parts[2] in self.server.instead:
                return self._instead(parts[2])
            return self._api("/".join(parts[2:4]), parts[4:])
        repo, path = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.server.repos.get(repo, {}).get(path)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if path in self.server.flipped:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if body:
            self.server.fetched.append(path)
        tag = hashlib.sha1(content).hexdigest()
        self._send(
            content if body else b"",
            200,
            {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'},
            len(content),
        )
        return None

    def _instead(self, owner: str) -> None:
        code, content = self.server.instead[owner]
        self._send(content, code, {}, len(content))

    def _api(self, repo: str, rest: list[str]) -> None:
        files = self.server.repos.get(repo)
        if files is None:
            return self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if rest and rest[0] == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self._json(tree)
        siblings = [{"rfilename": path} for path in files]
        return self._json(
            {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "siblings": siblings,
                "private": repo in self.server.created,
                "tags": [],
            }
        )

    def _json(self, value: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send(
            content, code, {"Content-Type": "application/json", **(headers or {})}, len(content)
        )

    def _send(self, content: bytes, code: int, headers: dict[str, str], length: int) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
