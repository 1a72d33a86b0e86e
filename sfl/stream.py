"""Bytes over a connected socket, in the clear or under TLS.

A ``Stream`` waits for the peer for as long as its timeout says, or not at all. One thread may
receive while another one sends: OpenSSL forbids that for one TLS connection, so a ``TlsStream``
lets one of them in at a time, and has nobody inside while it waits.
"""

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from sfl.certificates import certificate_hash
from sfl.errors import AuthError

T = TypeVar("T")
READ, WRITE = select.POLLIN, select.POLLOUT
RECORD_BYTES = 16 * 2**10  # of TLS, at most


class Stream:
    """A connected socket, in the clear."""

    certificate = b""  # hash of the peer's, if it showed one

    def __init__(self, sock: socket.socket) -> None:
        # What reads and writes the descriptor itself would bypass TLS.
        assert isinstance(self, TlsStream) == isinstance(sock, ssl.SSLSocket)
        self.sock = sock

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes, put them into ``buffer`` and return how many; 0: the peer has ended.

        Raises:
            TimeoutError: none came in time.
            OSError: the connection is broken.
        """
        return self.sock.recv_into(buffer)

    def receive_now(self, buffer: memoryview) -> int:
        """Do as ``receive_into``, but raise ``BlockingIOError`` if nothing has come."""
        return os.readv(self.sock.fileno(), [buffer])  # the descriptor is non-blocking

    def send(self, parts: Sequence[memoryview]) -> int:
        """Send of some bytes as many as fit, waiting until some do; return how many.

        Raises:
            TimeoutError: the peer took none in time.
            OSError: the connection is broken.
        """
        return self.sock.sendmsg(parts)

    def send_now(self, parts: Sequence[memoryview]) -> int:
        """Do as ``send``, but raise ``BlockingIOError`` if none fit."""
        return os.writev(self.sock.fileno(), parts)

    def shake_hands(self) -> int:
        """Go on with TLS's handshake, without waiting; return for what to wait, 0 if it is done."""
        return 0

    def set_timeout(self, timeout_s: float) -> None:
        self.sock.settimeout(timeout_s)

    def shut_sending(self) -> None:
        """End our half of the connection; what the peer still sends can be read."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection; a thread that waits on it wakes."""
        with contextlib.suppress(OSError):  # not SSLSocket's own: it would read on, undeciphered
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        self.sock.close()


class TlsStream(Stream):
    """A connected socket under TLS."""

    def __init__(self, sock: ssl.SSLSocket, timeout_s: float) -> None:
        super().__init__(sock)
        sock.settimeout(0)  # its calls never wait: we do, outside the lock
        self._tls = sock
        self._timeout_s = timeout_s
        self._inside = threading.Lock()

    def set_timeout(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def receive_into(self, buffer: memoryview) -> int:
        return self._waiting(lambda: self._tls.recv_into(buffer))

    def receive_now(self, buffer: memoryview) -> int:
        return self._at_once(lambda: self._tls.recv_into(buffer))

    def send(self, parts: Sequence[memoryview]) -> int:
        return self._waiting(lambda: self._send_record(parts))

    def send_now(self, parts: Sequence[memoryview]) -> int:
        return self._at_once(lambda: self._send_record(parts))

    def _send_record(self, parts: Sequence[memoryview]) -> int:
        """Send one record: a message's head and the beginning of its file go in the same."""
        first = next((part for part in parts if len(part)), memoryview(b""))
        if len(first) < RECORD_BYTES:
            together = b"".join(part[:RECORD_BYTES] for part in parts)
            first = memoryview(together)[:RECORD_BYTES]
        return self._tls.send(first)

    def shake_hands(self) -> int:
        with self._inside:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return READ
            except ssl.SSLWantWriteError:
                return WRITE
        return 0

    def finish_handshake(self) -> None:
        """Wait until TLS's handshake is done.

        Raises:
            TimeoutError, OSError: as ``receive_into``; ssl.SSLError: it failed.
        """
        deadline = time.monotonic() + self._timeout_s
        while wanted := self.shake_hands():
            self._wait(wanted, deadline)

    def _at_once(self, attempt: Callable[[], T]) -> T:
        try:
            with self._inside:
                return attempt()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def _waiting(self, attempt: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                with self._inside:
                    return attempt()
            except ssl.SSLWantReadError:
                wanted = READ
            except ssl.SSLWantWriteError:
                wanted = WRITE
            self._wait(wanted, deadline)

    def _wait(self, wanted: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self.sock, wanted)
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise TimeoutError


def to_server(
    sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float
) -> TlsStream:
    """Begin TLS with the server ``host``, whose certificate must be its.

    Raises:
        AuthError: its certificate is not to be trusted, or it does not speak TLS as we do.
        TimeoutError, OSError: the connection is lost.
    """
    name = host.partition("%")[0]  # of an IPv6 address with its interface
    wrapped = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
    stream = TlsStream(wrapped, timeout_s)
    try:
        stream.finish_handshake()
    except ssl.SSLCertVerificationError as error:
        stream.close()
        raise AuthError(
            f"the certificate of the server at {host} is not to be trusted:"
            f" {error.verify_message}; see --tls-ca"
        ) from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        stream.close()
        raise
    except ssl.SSLError as error:
        stream.close()
        raise AuthError(
            f"the server at {host} does not speak TLS 1.3 with us ({why(error)}): start it with"
            " --tls-cert and --tls-key, or leave out --tls-ca"
        ) from error
    except OSError:
        stream.close()
        raise
    stream.certificate = certificate_hash(wrapped.getpeercert(binary_form=True) or b"")
    return stream


def to_client(sock: socket.socket, context: ssl.SSLContext) -> TlsStream:
    """Return the stream to a client with which the handshake is still to be done."""
    wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    return TlsStream(wrapped, 0)


def why(error: ssl.SSLError) -> str:
    """Return in a few words what TLS did not like."""
    return (error.reason or str(error)).replace("_", " ").lower()


def is_refusal(error: ssl.SSLError) -> bool:
    """Say whether TLS ended since the peer does not trust us."""
    words = why(error)
    return "alert" in words and any(w in words for w in ("certificate", "unknown ca", "denied"))


def speaks_tls(sock: socket.socket) -> bool:
    """Say whether what a peer has sent first is the beginning of TLS's handshake."""
    return sock.recv(1, socket.MSG_PEEK) in (b"\x16", b"")
