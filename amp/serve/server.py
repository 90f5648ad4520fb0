"""Runs the application on a port until it is stopped."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from amp.errors import AmpError
from amp.serve.limits import CONNECTIONS, HEADER_SECONDS, STOP_SECONDS

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Protocol(H11Protocol):
    """uvicorn's protocol, which also closes connections of clients that are too slow.

    A connection is closed when no request has a complete header in time, and aborted when the client doesn't read the
    rest of an answer.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._check_later()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._check_later()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _check_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._check)

    def _check(self) -> None:
        if self.transport.is_closing():  # it waits for the client to read
            self.transport.abort()
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        self._check_later()


def bound_socket(host: str, port: int) -> socket.socket:
    """Takes a port. Connections are refused until the server runs.

    Raises:
        AmpError: The address doesn't exist, or the port is in use or not allowed.
    """
    if not 0 <= port < 1 << 16:
        raise AmpError(f"port is {port}, expected 0 to 65535; add --port NUMBER")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
        return found
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AmpError(f"port is {port}, which is in use, expected a free one; add --port NUMBER") from None
        raise AmpError(f"host is {host!r}, expected an address of this machine ({error.strerror})") from None


def address_of(found: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = found.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def accepted_names(found: socket.socket) -> frozenset[str] | None:
    """Hosts that requests may name, see `Guard`: those of this machine if it serves only itself, otherwise all."""
    return LOOPBACK if ipaddress.ip_address(found.getsockname()[0]).is_loopback else None


class Server(uvicorn.Server):
    """Serves an application until SIGINT or SIGTERM. Requests that are being handled are answered first.

    Args:
        app: ASGI application.
        started: Called when the server accepts connections.
    """

    def __init__(self, app, started: Callable[[], object]):
        self._started = started
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()
