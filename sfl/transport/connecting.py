"""Connecting over TCP to who listens."""

import errno
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sfl.errors import ConnectionLost, RunError
from sfl.transport.addresses import format_address, parse_address
from sfl.transport.connection import Socket, how_it_ended
from sfl.transport.shaping import UNSHAPED, shaped
from sfl.transport.stream import Stream, to_server
from sfl.values import LinkShape
from sfl.wire.messages import Limits

_MAX_BACKOFF_S = 5.0


@dataclass(frozen=True)
class Dialling:
    """How a machine connects to others. With ``tls`` a server must prove to be the host that was
    named; nothing is ever sent in the clear instead.
    """

    timeout_s: float
    tls: ssl.SSLContext | None = None
    shape: LinkShape = UNSHAPED
    on_wait: Callable[[str], None] = print  # told once, with the reason, when the first try fails
    limits: Limits = field(default_factory=Limits)  # no files are accepted yet


def _secured(sock: Socket, host: str, dialling: Dialling) -> Stream:
    if dialling.tls is None:
        return Stream(sock)
    try:
        return to_server(sock, dialling.tls, host, dialling.timeout_s)
    except OSError as error:
        how = "is silent" if isinstance(error, TimeoutError) else how_it_ended(error)
        raise ConnectionLost(f"the server {how} in the middle of TLS's handshake") from error


def open_stream(address: str, dialling: Dialling, patience_s: float, *, again: bool) -> Stream:
    """Connect, trying again with growing pauses until ``patience_s`` has passed.

    A name, too, may be known only a little later. ``again``: it was there before.

    Raises:
        AuthError: the server's certificate is not to be trusted, or it speaks no TLS.
        ConnectionLost: it ended TLS's handshake.
        ConfigError: it is no address.
        RunError: it is no name of a host, or nobody answered in time.
    """
    host, port = parse_address(address)
    deadline = time.monotonic() + patience_s
    pause_s, told = 0.1, False
    while isinstance(reached := _try(host, port, dialling, deadline), str):
        where = f"at {format_address(host, port)}"
        if deadline - time.monotonic() <= pause_s:
            raise RunError(
                f"no server {where} within {patience_s:g} seconds ({reached});"
                f" see --server and --{'re' if again else ''}connect-timeout"
            )
        if not told:
            patience = f"trying for {patience_s:g} seconds"
            dialling.on_wait(f"waiting for the server {where} ({reached}); {patience}")
            told = True
        time.sleep(pause_s)  # between tries there is nothing that could wake us
        pause_s = min(pause_s * 2, _MAX_BACKOFF_S)
    return reached


def _try(host: str, port: int, dialling: Dialling, deadline: float) -> Stream | str:
    """Connect, or say why it cannot be done now."""
    # One try is short: a firewall that drops packets answers nothing for minutes.
    attempt_s = min(max(deadline - time.monotonic(), 0.1), _MAX_BACKOFF_S)
    try:
        sock = socket.create_connection((host, port), timeout=attempt_s)
        if sock.getsockname() != sock.getpeername():
            return _secured(shaped(sock, dialling.shape), host, dialling)
        # Nobody listens, and the system gave us that very port: we reached ourselves.
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    except socket.gaierror as error:
        return f"unknown host {host!r}: {error.strerror or error}"
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError as error:  # by the codec for host names
        raise RunError(f"unknown host {host!r}: no host has such a name; see --server") from error
