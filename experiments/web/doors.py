"""Who may open a connection to the site, and what a request must look like.

A page of a stranger must not reach the site through its reader's browser: neither from its own
address (a request names the page that it comes from, ``Origin``, or at least whether that is one of
this site, ``Sec-Fetch-Site``) nor by a name that it lets point to this machine (DNS rebinding: a
request names the host that it is for, ``Host``). Only a link to the page may be followed.
"""

import asyncio
import contextlib
import http
import ipaddress
import os
import socket
import weakref
from collections.abc import Awaitable, Collection
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request

from experiments.web.carry import Open
from experiments.web.pages import Response, refusal
from sfl.transport.addresses import address_of, is_loopback
from sfl.transport.listener import listen
from sfl.transport.refusal_log import RefusalLog

MOST_SOCKETS = 192  # open at once
MOST_WEBSOCKETS = 128
REQUEST_WITHIN_S = 10.0  # of a connection, from its first byte to the end of its headers
_LOCAL = ("localhost", "127.0.0.1", "::1")
_OWN = ("", "same-origin", "none")  # of Sec-Fetch-Site: a program; our page; what a user has typed
_FOLLOWED = ("navigate", "document")  # Sec-Fetch-Mode and -Dest of a link that is followed


class BoundedListener(socket.socket):
    """A listening socket that has at most ``MOST_SOCKETS`` connections open.

    When more come, the oldest that has not sent its request yet is closed, so that silent ones keep
    nobody out; if all have, the new one is.
    """

    @classmethod
    def on(cls, host: str, port: int, refusals: RefusalLog) -> "BoundedListener":
        """Listen.

        Raises:
            RunError: the host is not this machine's, or the port is in use.
        """
        with listen(host, port) as listener:
            found = cls(fileno=os.dup(listener.fileno()))
        found._refusals = refusals
        found._open = weakref.WeakSet()
        found._silent = {}
        return found

    _refusals: RefusalLog
    _open: "weakref.WeakSet[socket.socket]"
    _silent: dict[int, socket.socket]  # that have sent no request yet, by descriptor

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            ConnectionAbortedError: it was closed at once.
        """
        sock, address = super().accept()
        self._silent = {number: s for number, s in self._silent.items() if s.fileno() == number}
        if sum(s.fileno() >= 0 for s in self._open) >= MOST_SOCKETS:
            self._refusals.add(address_of(sock), f"{MOST_SOCKETS} connections are open")
            if not self._silent:
                sock.close()
                raise ConnectionAbortedError
            silent = self._silent.pop(next(iter(self._silent)))
            with contextlib.suppress(OSError):  # it has just left
                silent.shutdown(socket.SHUT_RDWR)
        self._open.add(sock)
        self._silent[sock.fileno()] = sock
        return sock, address

    def has_asked(self, number: int) -> None:
        """Note that the connection of this descriptor has sent its request."""
        self._silent.pop(number, None)


class Visitor(ServerConnection):
    """A connection whose request must come in time."""

    _open_server: Open | None = None

    @property
    def open_server(self) -> Open:
        """What connects to the server that its WebSocket is for."""
        assert self._open_server is not None, "a WebSocket that was not let in"
        return self._open_server

    def let_in(self, open_server: Open) -> None:
        """Note the server that its WebSocket is for."""
        self._open_server = open_server

    async def handshake(self, *args: Any, **options: Any) -> None:
        awaited: list[Awaitable[None]] = [self.request_rcvd, self.connection_lost_waiter]
        async with asyncio.timeout(REQUEST_WITHIN_S):
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        await super().handshake(*args, **options)


class Doors:
    """Checks requests; ``refusals`` gets a line for each that is turned away."""

    def __init__(self, host: str, names: Collection[str], *, is_tls: bool) -> None:
        """``host``: the one to listen on; ``names``: those by which pages may come."""
        self._is_local, self.is_tls = is_loopback(host), is_tls
        self._names = {*_LOCAL, host.lower(), *(name.lower() for name in names)}

    def refused(self, request: Request, *, is_websocket: bool) -> Response | None:
        """Return the response to a request that is turned away; None if it is let in."""
        host, origin = _only(request, "Host"), _only(request, "Origin")
        if not self._is_ours(host):
            given = "give --name NAME to the site to let pages come by another name"
            return refusal(http.HTTPStatus.MISDIRECTED_REQUEST, f"this is not that host: {given}")
        if (origin and _host_of(origin) != host.lower()) or _is_strangers(request):
            return refusal(http.HTTPStatus.FORBIDDEN, "a page of another site")
        if request.method not in ("GET", "HEAD") or (is_websocket and request.method != "GET"):
            return refusal(http.HTTPStatus.METHOD_NOT_ALLOWED, "GET is answered, nothing else")
        return None

    def _is_ours(self, host: str) -> bool:
        name = name_in(host)
        return name in self._names or (not self._is_local and _is_ip(name))

    def is_isolated(self, host: str) -> bool:
        """Return whether a browser takes this host's pages for safe, as for https and localhost."""
        return self.is_tls or name_in(host) in _LOCAL

    def headers(self, host: str) -> dict[str, str]:
        """Return the headers of every response to a request for a host."""
        # Where 'self' does not name a WebSocket, this does; no policy can name an IPv6 address.
        own = "" if host.startswith("[") else f" {'wss' if self.is_tls else 'ws'}://{host}"
        policy = {
            "default-src": "'self'",
            "script-src": "'self' 'wasm-unsafe-eval'",
            "connect-src": f"'self'{own}",
            "img-src": "'self' data: blob:",
            "worker-src": "'self' blob:",
            "object-src": "'none'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        found = {
            "Content-Security-Policy": "; ".join(
                f"{name} {value}" for name, value in policy.items()
            ),
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if self.is_isolated(host):  # elsewhere a browser logs an error for these
            found["Cross-Origin-Opener-Policy"] = "same-origin"
            found["Cross-Origin-Embedder-Policy"] = "require-corp"
        return found


def _only(request: Request, name: str) -> str:
    """Return a header's value; "" if it is missing or there are several."""
    values = request.headers.get_all(name)
    return values[0].strip() if len(values) == 1 else "/" * bool(values)


def _is_strangers(request: Request) -> bool:
    """Return whether a browser says that a page of another site asks, other than by a link."""
    if _only(request, "Sec-Fetch-Site") in _OWN:
        return False
    how = _only(request, "Sec-Fetch-Mode"), _only(request, "Sec-Fetch-Dest")
    return request.path.partition("?")[0] != "/" or how != _FOLLOWED


def _host_of(origin: str) -> str:
    """Return the host and port in an origin; "" if it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def name_in(host: str) -> str:
    """Return the name in ``NAME:PORT``; "" if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    plain = parts.netloc == host and not parts.username
    return (parts.hostname or "").rstrip(".") if plain else ""


def _is_ip(name: str) -> bool:
    """Return whether a name is an address, which no stranger can let point to another machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
