"""Listening for connections over TCP."""

import os
import socket

from sfl.errors import RunError
from sfl.transport.addresses import format_address
from sfl.transport.connection import Socket
from sfl.transport.shaping import UNSHAPED, shaped
from sfl.values import LinkShape


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

    def set_nonblocking(self) -> None:
        """Make ``accept`` return at once from now on."""
        self._sock.settimeout(0)

    def fileno(self) -> int:
        """Return the descriptor, readable when ``accept`` has a socket."""
        return self._sock.fileno()

    def accept(self) -> Socket | None:
        """Return the socket of the next connection; None if non-blocking and there is none.

        Raises:
            OSError: accepting failed, for example with too many open files.
        """
        try:
            return shaped(self._sock.accept()[0], self._shape)
        except (BlockingIOError, ConnectionAbortedError):  # none, or it has disconnected already
            return None

    def close(self) -> None:
        self._sock.close()


def listen(host: str, port: int, shape: LinkShape = UNSHAPED) -> Listener:
    """Listen on ``host`` (IPv4 or IPv6; "::" is both) and ``port``.

    Connections get the ``shape`` of ``--link``. The port of a run that has just ended is available.

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
