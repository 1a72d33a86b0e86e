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
