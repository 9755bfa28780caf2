"""Listen, serve until interrupted, and say in one line why that cannot be.

Nobody holds a place by being silent: a connection that waits for its client is closed after some seconds, whole
requests alone are worked on, and when there are too many connections the one that has waited longest makes room.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections import Counter
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from wsae.core.errors import UserError
from wsae.serve.guard import App

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

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.since = self.loop.time()

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn: no request, half a request, or an answer that is not taken."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered or self.cycle.more_body or self.flow.write_paused

    @property
    def peer(self) -> str:
        """The address it comes from."""
        return self.client[0] if self.client else ""

    def overdue(self, now: float) -> bool:
        """Whether the client has had its time."""
        answered = self.cycle is None or self.cycle.response_complete
        return self.waits and now - self.since > (HEAD_S if answered else STALL_S)

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection in, or the place of one that waits."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) <= MAX_CONNECTIONS:
            return
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        held = Counter(other.peer for other in others)
        waiting = [other for other in others if other.waits]
        if not waiting:
            transport.write(FULL)
            transport.close()
            return
        last = max(waiting, key=lambda c: (held[c.peer], -c.since))
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
                if isinstance(connection, Connection) and connection.overdue(now):
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
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].split("%")[0]).is_loopback


def address_of(listening: socket.socket) -> str:
    """Return the address to open in a browser."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host.split("%")[0]).is_unspecified:
        host = "127.0.0.1" if ":" not in host else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def configured(app: App) -> uvicorn.Server:
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


def serve(app: App, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; requests under way are finished."""
    with contextlib.suppress(KeyboardInterrupt):  # the server has ended: that is how it is meant
        configured(app).run(sockets=[listening])
