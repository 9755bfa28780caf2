"""Listen, serve until interrupted, and say in one line why that cannot be.

Nobody holds a place by being silent: a connection that waits for its client is closed after some seconds, whole
requests alone are worked on, and when there are too many connections the one that has waited longest makes room.
"""

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from wsae.core.errors import UserError

# What every request passes: is it meant for this server, where do its links lead, what may a
# browser do with it.
#
# A page elsewhere can make a browser send requests here. It cannot read the answers, unless a name
# of its own leads to this address (DNS rebinding): on the loopback interface only addresses of the
# loopback, `localhost` and the names that were allowed are answered.
#
# Behind a proxy the server may lie under a path. It is known from `--root-path`, or from the
# X-Forwarded-Prefix of a proxy on this machine; links then begin with it. Where it is not known
# links are relative, so that they lead right behind a proxy that takes its path away and says
# nothing.

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
MAX_TARGET, MAX_PREFIX = 4096, 512
_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|$))(?:[A-Za-z0-9._~@:+,=!-]|%[0-9A-Fa-f]{2})+)+")
"""A path of segments that are not empty and lead nowhere up, so that it is never another host's address."""
_HOST = re.compile(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]")
_ROOMS = ("/r/", "/api/", "/static/")


@dataclass(frozen=True)
class Gate:
    """Under which names and which path the server is reached."""

    loopback: bool = True
    """Return whether it listens there alone."""
    hosts: tuple[str, ...] = ()
    """Names that are answered beside the loopback's own, as `host_name` gives them."""
    root_path: str = ""
    """The path it lies under, as `path_prefix` gives it."""

    def answers(self, name: str) -> bool:
        """Return whether requests for a host, without its port, are for this server."""
        return not self.loopback or _is_loopback(name) or name in map(_name_of, self.hosts)


_FORMS = re.compile(r"/(?:live|steer|attribute|([0-9]+))$")
"""What may be sent: a text, what to steer or attribute, and a latent's name."""


class Guard:
    """Refuses foreign hosts, foreign origins and other methods; adds the headers to every answer."""

    def __init__(self, app: ASGIApp, gate: Gate, key: str) -> None:
        self.app, self.gate, self.key = app, gate, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        scope = self.placed(scope, headers)
        refused = self.refusal(scope, headers)
        answer = self.app if refused is None else PlainTextResponse(refused[1] + "\n", refused[0])
        await answer(scope, receive, guarded)

    def placed(self, scope: Scope, headers: Mapping[str, str]) -> Scope:
        """Return a request with the path it has here, and what leads from it to the start: `links` and `api_links`."""
        path, prefix = scope["path"], self.gate.root_path
        if not prefix and _from_here(scope):
            told = headers.get("x-forwarded-prefix", "").rstrip("/")
            prefix = told if len(told) <= MAX_PREFIX and _PREFIX.fullmatch(told) else ""
        rest = path.removeprefix(unquote(prefix)) if prefix else path
        if rest in ("", "/") or rest.startswith(_ROOMS):
            path = rest  # else the proxy has taken the prefix away already
        raw = scope.get("raw_path") or path.encode()
        up = "../" * (raw.count(b"/") - 1) or "./"
        return {
            **scope,
            "path": path.rstrip("/") or "/",
            "links": f"{prefix}/" if prefix else up,
            "api_links": f"{prefix}/",
        }

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Return (status, one line) where a request is not answered."""
        host = headers.get("host", "")
        name = _name_of(host)
        if not self.gate.answers(name):
            known = len(name) <= 253 and _HOST.fullmatch(name)
            advice = f"--allow-host {name}" if known else "--allow-host NAME"
            return (
                421,
                f"this server answers to localhost and the addresses of the loopback, not to the host of this "
                f"request; if it is yours, restart wsae serve with {advice}",
            )
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > MAX_TARGET:
            return 414, f"the address is longer than {MAX_TARGET} characters"
        method, form = scope["method"], _FORMS.search(scope["path"])
        if method not in ("GET", "HEAD") and not (method == "POST" and form):
            return 405, f"{method[:20]}: only GET is answered here"
        if method == "POST" and form and form[1] is not None and not self.gate.loopback:
            return 403, "latents are named where the server listens on its own machine alone"
        if method == "POST" and not self.same_origin(headers, _from_here(scope)):
            given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]
            nameless = headers.get("origin", "null") == "null"
            if not (nameless and hmac.compare_digest(given.encode(), self.key.encode())):
                return 403, "the request comes from another site"
        return None

    def same_origin(self, headers: Mapping[str, str], from_here: bool) -> bool:
        """Return whether a POST comes from a page of this server, or from no browser at all.

        A browser's Sec-Fetch-Site tells whose page asks, whatever host a proxy puts into the request. Where it is not
        sent (plain HTTP beyond the loopback) the origin does: it is the request's host, the one that a proxy on this
        machine was asked for, or one that was allowed. Forms on pages without referrer send "Origin: null"; there the
        form's key stands for it, which no other site can read.
        """
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if site is not None:
            return site == "same-origin"
        if origin is None:
            return True
        scheme, _, place = origin.lower().partition("://")
        asked = headers.get("x-forwarded-host", "") if from_here else ""
        hosts = (headers.get("host", "").lower(), asked.lower(), *self.gate.hosts)
        return scheme in ("http", "https") and bool(place) and place in hosts


def _from_here(scope: Scope) -> bool:
    """Return whether who is connected is on this machine: what a proxy says of a request is believed of no other."""
    return _is_loopback((scope.get("client") or ("", 0))[0])


def _name_of(host: str) -> str:
    """Return the host without its port and last dot, in lower case."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower().removesuffix(".")


def _is_loopback(name: str) -> bool:
    """Return whether a host means the loopback, whoever is asked for the name: an address, or below `localhost`."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(name.removeprefix("[").removesuffix("]").split("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def host_name(given: str) -> str:
    """Return the value of --allow-host, "NAME" or "NAME:PORT"; raises UserError when it is no name of a host."""
    named = given.strip().lower().removesuffix(".")
    if ":" in named and named.count(":") > 1 and not named.startswith("["):
        named = f"[{named}]"
    name, _, port = named.rpartition(":")
    bare = name if name and port.isdigit() else named
    if not _HOST.fullmatch(bare) or len(bare) > 253:
        host = _name_of(urlsplit(named).netloc.rpartition("@")[2]) if "://" in named else ""
        advice = (
            f"--allow-host {host}" if _HOST.fullmatch(host) else "a name such as hub.example.org"
        )
        raise UserError(f"--allow-host {given[:80]}: not the name of a host; give {advice}")
    return named


def path_prefix(given: str) -> str:
    """Return the value of --root-path, without a slash at its end; raises UserError when it is no path."""
    path = re.sub(r"[^\x00-\x7f]+", lambda found: quote(found[0]), given.strip().rstrip("/"))
    if path and (len(path) > MAX_PREFIX or not _PREFIX.fullmatch(path)):
        inner = (
            urlsplit(given.strip()).path.rstrip("/") if "://" in given else f"/{path.strip('/')}"
        )
        advice = (
            inner if len(inner) < MAX_PREFIX and _PREFIX.fullmatch(inner) else "/user/me/proxy/8137"
        )
        raise UserError(
            f"--root-path {given[:80]}: not a path of this server; give one such as {advice}"
        )
    return path


BACKLOG = 128
MAX_PORT = 65535
MAX_CONNECTIONS = 256
HEAD_S = 10
"""Seconds in which a request must be there, from when its connection was opened or last answered."""
STALL_S = 30
"""Seconds that a client may take to send a body, or to take what is ready for it."""
IDLE_S = 5
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)


class Connection(H11Protocol):
    """A connection that knows since when it has waited for its client."""

    since = 0.0

    @property
    def patience(self) -> int | float:
        """The seconds its client may take; without end while it is our turn.

        It is the client's: no request, half a request, or an answer that is not taken.
        """
        if self.cycle is None or self.cycle.response_complete:
            return HEAD_S
        return STALL_S if self.cycle.more_body or self.flow.write_paused else math.inf

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection in, or the place of one that waits."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) <= MAX_CONNECTIONS:
            return
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        held = Counter(other.client and other.client[0] for other in others)
        waiting = [other for other in others if other.patience < math.inf]
        if not waiting:
            transport.write(FULL)
            transport.close()
            return
        last = max(waiting, key=lambda c: (held[c.client and c.client[0]], -c.since))
        self.connections.discard(last)
        last.transport.abort()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Begin to wait for the client to take what is ready."""
        self.since = self.loop.time()
        super().pause_writing()


class Sweeping(uvicorn.Server):
    """A server that closes connections whose clients have had their time."""

    async def on_tick(self, counter: int) -> bool:
        """Look at every connection, twice a second."""
        if counter % 5 == 0:
            now = asyncio.get_running_loop().time()
            for connection in [*self.server_state.connections]:
                if (
                    isinstance(connection, Connection)
                    and now - connection.since > connection.patience
                ):
                    connection.transport.abort()
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises UserError when the port is taken or the address is not of this machine."""
    if not 0 <= port <= MAX_PORT:
        raise UserError(f"--port {port}: not a port; give a number from 0 to {MAX_PORT}")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted sockets inherit it: else the body of a page waits 40 ms for the head's acknowledgement
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            found.bind(address)
            found.listen(BACKLOG)
        except OSError:
            found.close()
            raise
        return found
    except (OSError, UnicodeError) as error:
        raise UserError(_why(error, host, port)) from error


def _why(error: OSError | UnicodeError, host: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"--port {port}: in use on {host}; give another with --port (0: any free one)"
    if number == errno.EACCES:
        return f"--port {port}: not allowed here; give one above 1023"
    why = os.strerror(number) if number and number > 0 else "unknown name"
    return f"--host {host[:80]}: cannot listen there ({why}); try --host 127.0.0.1"


def is_loopback(listening: socket.socket) -> bool:
    """Return whether only this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].split("%")[0]).is_loopback


def address_of(listening: socket.socket) -> str:
    """Return the address to open in a browser."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host.split("%")[0]).is_unspecified:
        host = "127.0.0.1" if ":" not in host else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def configured(app: ASGIApp) -> uvicorn.Server:
    """Return the server of an application: no log of visits or of what was no request, no word of what it is."""
    config = uvicorn.Config(
        app,
        http=Connection,
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,  # who asks is who is connected: `guard` trusts a proxy on this machine alone
        timeout_graceful_shutdown=5,
        timeout_keep_alive=IDLE_S,
        ws="none",
    )
    return Sweeping(config)


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; requests under way are finished."""
    with contextlib.suppress(KeyboardInterrupt):  # the server has ended: that is how it is meant
        configured(app).run(sockets=[listening])
