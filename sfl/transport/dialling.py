"""Listening, and connecting to who listens."""

import errno
import os
import re
import socket
import ssl
import time
from collections.abc import Callable

from sfl.errors import ConfigError, ConnectionLost, RunError, quoted
from sfl.nodes import DEFAULT_PORT
from sfl.transport.connection import Connection, Socket, _how, format_address
from sfl.transport.shaping import shaped
from sfl.transport.stream import Stream, to_server
from sfl.values import LinkShape
from sfl.wire.messages import Limits

_MAX_BACKOFF_S = 5.0
UNSHAPED = LinkShape()


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; without a port, a server's own.

    Raises:
        ConfigError: the text is no such address.
    """
    found = re.fullmatch(r"(?:\[([^][]+)\]|([^][:\s]+))(?::(\d{1,5}))?", text, re.ASCII)
    port = int(found[3] or DEFAULT_PORT) if found else 0
    if not (found and 0 < port < 65536):
        raise ConfigError(
            f"{quoted(text)} is no address: give HOST:PORT, or HOST for port {DEFAULT_PORT}, with"
            " an IPv6 host in brackets: [HOST]:PORT"
        )
    return found[1] or found[2], port


def _secured(sock: Socket, host: str, tls: ssl.SSLContext | None, timeout_s: float) -> Stream:
    if tls is None:
        return Stream(sock)
    try:
        return to_server(sock, tls, host, timeout_s)
    except OSError as error:
        how = "is silent" if isinstance(error, TimeoutError) else _how(error)
        raise ConnectionLost(f"the server {how} in the middle of TLS's handshake") from error


class Listener:
    """A listening socket. Closed by ``with`` or ``close()``."""

    def __init__(self, sock: Socket, shape: LinkShape) -> None:
        self._sock, self._shape = sock, shape
        self.address = format_address(*sock.getsockname()[:2])
        self.port: int = sock.getsockname()[1]

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def do_not_wait(self) -> None:
        """Let nobody wait in ``accept`` from now on."""
        self._sock.settimeout(0)

    def fileno(self) -> int:
        """Return the descriptor to wait for until ``accept`` gives a socket."""
        return self._sock.fileno()

    def accept(self) -> Socket | None:
        """Return the socket of the next connection, waiting for it; None if we are not to wait.

        Raises:
            OSError: it cannot be had: too many files are open, for one.
        """
        try:
            return shaped(self._sock.accept()[0], self._shape)
        except (BlockingIOError, ConnectionAbortedError):  # the peer gave up before
            return None

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


def listen(host: str, port: int, shape: LinkShape = UNSHAPED) -> Listener:
    """Listen on ``host`` (IPv4 or IPv6; "::" takes both) and ``port``.

    What comes is shaped as a link of that ``shape``.
    The port of a run that has just ended can be taken again at once.

    Raises:
        RunError: the host is not this machine's, or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        # create_server sets SO_REUSEADDR where it means "in TIME_WAIT too", not on Windows.
        sock = socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
        return Listener(sock, shape)
    except (OSError, UnicodeError) as error:
        reason: str | None = "no host has such a name"
        if isinstance(error, OSError):
            in_system = error.errno is not None and not isinstance(error, socket.gaierror)
            reason = os.strerror(error.errno or 0) if in_system else error.strerror
        raise RunError(
            f"cannot listen on {format_address(host, port)}: {reason};"
            " another --port or --host may be free"
        ) from error


def connect(
    host: str,
    port: int,
    *,
    timeout_s: float,
    connect_timeout_s: float,
    again: bool = False,
    limits: Limits,
    on_wait: Callable[[str], None],
    tls: ssl.SSLContext | None = None,
    shape: LinkShape = UNSHAPED,
) -> Connection:
    """Connect, trying again with growing pauses until ``connect_timeout_s`` has passed.

    ``on_wait`` is told once, with the reason, when the first try fails: a name, too, may be known
    only a little later. ``again``: it was there before. With ``tls`` the server must prove to be
    the host; nothing is ever sent in the clear instead.

    Raises:
        AuthError: the server's certificate is not to be trusted, or it speaks no TLS.
        ConnectionLost: it ended TLS's handshake.
        RunError: it is no name of a host, or nobody answered in time.
    """
    address = format_address(host, port)
    deadline = time.monotonic() + connect_timeout_s
    pause_s = 0.1
    told = False
    while True:
        left_s = deadline - time.monotonic()
        try:
            # One try is short: a firewall that drops packets answers nothing for minutes.
            attempt_s = min(max(left_s, 0.1), _MAX_BACKOFF_S)
            sock = socket.create_connection((host, port), timeout=attempt_s)
            if sock.getsockname() != sock.getpeername():
                stream = _secured(shaped(sock, shape), host, tls, timeout_s)
                connection = Connection(stream, timeout_s=timeout_s, limits=limits)
                connection.certificate = stream.certificate
                return connection
            # Nobody listens, and the system gave us that very port: we reached ourselves.
            sock.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        except socket.gaierror as error:
            reason = f"unknown host {host!r}: {error.strerror or error}"
        except OSError as error:
            reason = error.strerror or str(error)
        except UnicodeError as error:  # by the codec for host names
            raise RunError(
                f"unknown host {host!r}: no host has such a name; see --server"
            ) from error
        if deadline - time.monotonic() <= pause_s:
            raise RunError(
                f"no server at {address} within {connect_timeout_s:g} seconds ({reason});"
                f" see --server and --{'re' if again else ''}connect-timeout"
            )
        if not told:
            patience = f"trying for {connect_timeout_s:g} seconds"
            on_wait(f"waiting for the server at {address} ({reason}); {patience}")
            told = True
        time.sleep(pause_s)  # between tries there is nothing that could wake us
        pause_s = min(pause_s * 2, _MAX_BACKOFF_S)
