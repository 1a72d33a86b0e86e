"""Connecting to a server over TCP, with retries."""

import errno
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sfl.errors import ConfigError, ConnectionLost, RunError, command
from sfl.transport.addresses import Address, format_address, parse_url
from sfl.transport.certificates import trusted_by_system
from sfl.transport.connection import Socket, how_it_ended
from sfl.transport.shaping import UNSHAPED, shaped
from sfl.transport.stream import Stream, start_tls
from sfl.values import LinkShape
from sfl.wire.messages import Limits

_MAX_BACKOFF_S = 5.0


@dataclass(frozen=True)
class Dialling:
    """How a machine connects to servers. With ``tls`` there is no fallback to plain TCP."""

    timeout_s: float
    tls: ssl.SSLContext | None = None
    shape: LinkShape = UNSHAPED
    on_wait: Callable[[str], None] = print  # called once, with the reason, if the first try fails
    limits: Limits = field(default_factory=Limits)  # at first no files are accepted


def _opened(sock: Socket, to: Address, dialling: Dialling) -> Stream:
    """Return a stream over a connected socket, after the handshakes of TLS and WebSocket."""
    tls = dialling.tls
    if to.transport == "wss" and tls is None:
        tls = trusted_by_system()
    stream = Stream(sock)
    stream.set_timeout(dialling.timeout_s)
    try:
        if tls is not None:
            stream = start_tls(sock, tls, to.host, dialling.timeout_s)
        if to.transport in ("ws", "wss"):
            from sfl.transport.websocket import opened  # a library that few runs need

            stream = opened(stream, to.url)
    except ConnectionRefusedError:  # by a proxy: tried again
        stream.close()
        raise
    except OSError as error:
        stream.close()
        how = "is silent" if isinstance(error, TimeoutError) else how_it_ended(error)
        raise ConnectionLost(f"the server {how} in the middle of a handshake") from error
    return stream


def open_stream(
    address: str, dialling: Dialling, patience_s: float, *, is_reconnect: bool
) -> Stream:
    """Connect, retrying with growing pauses for up to ``patience_s``.

    An unknown host name is retried too: DNS may know it later. ``is_reconnect``: a server has
    answered at this address before.

    Raises:
        AuthError: the server's certificate is not trusted, or it does not speak TLS.
        ConnectionLost: the connection ended during TLS's handshake.
        ConfigError: the address is malformed, or of a transport that --tls-ca does not go with.
        RunError: the host name is invalid, or no server answered in time.
    """
    to = parse_url(address)
    if to.transport == "ws" and dialling.tls is not None:
        raise ConfigError(f"{address}: with --tls-ca give wss://, which is a WebSocket under TLS")
    if is_reconnect and to.transport in ("mpi", "rpc"):
        raise RunError(
            f"over {to.transport} no process can come back: start all again, the server with"
            " --resume"
        )
    deadline = time.monotonic() + patience_s
    pause_s, has_reported = 0.1, False
    while isinstance(reached := _try(to, dialling, deadline), str):
        where = f"at {format_address(to.host, to.port)}"
        if deadline - time.monotonic() <= pause_s:
            raise RunError(
                f"no server {where} within {patience_s:g} seconds ({reached});"
                f" see --server and --{'re' if is_reconnect else ''}connect-timeout"
            )
        if not has_reported:
            patience = f"trying for {patience_s:g} seconds"
            dialling.on_wait(f"waiting for the server {where} ({reached}); {patience}")
            has_reported = True
        time.sleep(pause_s)  # there is no event to wait for between tries
        pause_s = min(pause_s * 2, _MAX_BACKOFF_S)
    return reached


def _over_tcp(to: Address, timeout_s: float) -> Socket:
    sock = socket.create_connection((to.host, to.port), timeout=timeout_s)
    if sock.getsockname() == sock.getpeername():
        # No server listens, and our own outgoing port was the same: we connected to ourselves.
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


def _over_http(to: Address, timeout_s: float) -> Socket:
    from sfl.transport.http_proxy import connect_through_proxy

    return connect_through_proxy(to, timeout_s) or _over_tcp(to, timeout_s)


def _over_mpi(to: Address, timeout_s: float) -> Socket:
    from sfl.transport.mpi import SERVER, world  # importing it starts MPI

    if world().rank == SERVER:
        raise ConfigError(f"--server mpi://: the clients are started by mpirun: {command('mpi')}")
    return world().connect()


def _over_rpc(to: Address, timeout_s: float) -> Socket:
    from sfl.transport.rpc import joined

    rank, size = map(int, to.path.strip("/").split("/"))
    joined().join(f"rank_{rank}", rank, size, format_address(to.host, to.port))
    return joined().connect()


_CONNECTING = {"ws": _over_http, "wss": _over_http, "mpi": _over_mpi, "rpc": _over_rpc}


def _try(to: Address, dialling: Dialling, deadline: float) -> Stream | str:
    """Connect once; return the stream, or the reason why it failed."""
    # The timeout is short: a firewall that drops packets never answers.
    attempt_s = min(max(deadline - time.monotonic(), 0.1), _MAX_BACKOFF_S)
    try:
        sock = _CONNECTING.get(to.transport, _over_tcp)(to, attempt_s)
        return _opened(shaped(sock, dialling.shape), to, dialling)
    except socket.gaierror as error:
        return f"unknown host {to.host!r}: {error.strerror or error}"
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError as error:  # from the codec for host names
        raise RunError(
            f"unknown host {to.host!r}: no host has such a name; see --server"
        ) from error
