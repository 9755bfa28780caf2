"""Listen, serve until interrupted, and say in one line why that cannot be."""

import contextlib
import errno
import ipaddress
import os
import socket

import uvicorn

from wsae.core.errors import UserError
from wsae.serve.guard import App

BACKLOG = 64
MAX_PORT = 65535


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises UserError when the port is taken or the address is not of this machine."""
    if not 0 <= port <= MAX_PORT:
        raise UserError(f"--port {port}: not a port; give a number from 0 to {MAX_PORT}")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen(BACKLOG)
        except OSError:
            found.close()
            raise
        return found
    except OSError as error:
        raise UserError(_why(error, host, port)) from error


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: in use on {host}; give another with --port (0: any free one)"
    if error.errno == errno.EACCES:
        return f"--port {port}: not allowed here; give one above 1023"
    why = error.strerror if error.errno and error.errno > 0 else "unknown name"
    return f"--host {host}: cannot listen there ({why or os.strerror(error.errno or 0)}); try --host 127.0.0.1"


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
    """Return the server of an application: no log of visits, no word of what it is made of."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=BACKLOG,
        ws="none",
    )
    return uvicorn.Server(config)


def serve(app: App, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; requests under way are finished."""
    with contextlib.suppress(KeyboardInterrupt):  # the server has ended: that is how it is meant
        configured(app).run(sockets=[listening])
