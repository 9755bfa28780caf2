"""What every request passes: is it meant for this server, and what the answer may do in a browser.

A page elsewhere can make a browser send requests here. It cannot read the answers, unless a name of its own leads to
this address (DNS rebinding): on the loopback interface only the loopback's own names are answered.
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
MAX_TARGET = 4096


class Guard:
    """Refuses foreign hosts, foreign origins and other methods; adds the headers to every answer."""

    def __init__(self, app: App, loopback: bool, key: str) -> None:
        self.app, self.loopback, self.key = app, loopback, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = [(k, v) for k, v in message.get("headers", []) if k.decode() not in HEADERS]
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message = {**message, "headers": [*given, *own]}
            await send(message)

        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refused = self.refusal(scope, headers)
        if refused is None:
            await self.app(scope, receive, guarded)
            return
        status, line = refused
        kind = [(b"content-type", b"text/plain; charset=utf-8")]
        await guarded({"type": "http.response.start", "status": status, "headers": kind})
        await guarded({"type": "http.response.body", "body": (line + "\n").encode()})

    def refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return (status, one line) where a request is not answered."""
        host = headers.get("host", "")
        if self.loopback and _name_of(host) not in LOOPBACK:
            return (
                421,
                f"this server answers to {', '.join(LOOPBACK)}, not to the host of this request",
            )
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > MAX_TARGET:
            return 414, f"the address is longer than {MAX_TARGET} characters"
        method, live = scope["method"], scope["path"].endswith("/live")
        if method not in ("GET", "HEAD") and not (method == "POST" and live):
            return 405, f"{method}: only GET is answered here"
        if method == "POST" and not same_origin(headers, host):
            given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]
            nameless = headers.get("origin", "null") == "null"
            if not (nameless and hmac.compare_digest(given.encode(), self.key.encode())):
                return 403, "the request comes from another site"
        return None


def _name_of(host: str) -> str:
    """Return the host without its port, in lower case."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()


def same_origin(headers: dict[str, str], host: str) -> bool:
    """Whether a POST comes from a page of this server, or from no browser at all.

    Forms on pages without referrer send "Origin: null"; the browser's own Sec-Fetch-Site tells whose they are. Where
    it is not sent (plain HTTP beyond the loopback) the form's key does, which no other site can read.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None or origin == "null":
        return site == "same-origin" if origin == "null" else site in (None, "same-origin")
    return origin in (f"http://{host}", f"https://{host}") and site in (None, "same-origin")
