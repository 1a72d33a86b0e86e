"""Bytes over a connected socket, in the clear or under TLS.

A ``Stream`` blocks up to its timeout, or not at all. One thread may receive while another sends.
OpenSSL does not allow that on one TLS connection, and its own socket reads last as long as a peer
keeps sending. So a ``TlsStream`` reads and writes the socket itself, and passes the bytes to
OpenSSL through memory, one thread at a time::

    socket -> incoming -> OpenSSL -> plain bytes received
    socket <- unsent <- outgoing <- OpenSSL <- plain bytes to send
"""

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import cast

from sfl.errors import AuthError
from sfl.transport.certificates import certificate_hash

RAW_BYTES = 64 * 2**10  # read from the socket, or encrypted, in one call
# OpenSSL's reasons for a handshake whose bytes were damaged in transit, in either direction.
_DAMAGE = (
    "bad record mac", "decode error", "illegal parameter", "unexpected message", "bad length",
    "invalid session id", "bad extension", "bad key share", "digest check failed",
)  # fmt: skip
MAX_UNASKED_BYTES = 64 * 2**10  # of queued TLS replies: a peer may request new keys endlessly


class Stream:
    """A connected socket without TLS."""

    certificate = b""  # hash of the peer's certificate, if it presented one
    is_ready = True  # whether the handshake, if any, is complete
    has_unsent = False  # whether accepted bytes are not sent yet
    raw_bytes_received = 0  # of the socket: including what is TLS's or WebSocket's own

    def __init__(self, sock: socket.socket) -> None:
        # Reads and writes on the descriptor would bypass TLS.
        assert not isinstance(sock, ssl.SSLSocket)
        self.sock = sock

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes, write them to ``buffer`` and return how many; 0: end of stream.

        Raises:
            TimeoutError: no bytes arrived in time.
            OSError: the connection is broken.
        """
        return self.sock.recv_into(buffer)

    def receive_now(self, buffer: memoryview) -> int:
        """Do as ``receive_into``, but raise ``BlockingIOError`` instead of waiting."""
        num_bytes = os.readv(self.sock.fileno(), [buffer])  # the descriptor is non-blocking
        self.raw_bytes_received += num_bytes
        return num_bytes

    def send(self, parts: Sequence[memoryview]) -> int:
        """Wait until the socket accepts some of the bytes; return how many it accepted.

        Call it again while ``has_unsent``, with no bytes if there are no more.

        Raises:
            TimeoutError: the socket accepted none in time.
            OSError: the connection is broken.
        """
        return self.sock.sendmsg(parts)

    def send_now(self, parts: Sequence[memoryview]) -> int:
        """Do as ``send``, but raise ``BlockingIOError`` instead of waiting."""
        return os.writev(self.sock.fileno(), parts)

    def do_handshake_now(self) -> bool:
        """Continue the handshake without waiting; return whether it is complete."""
        return True

    def set_timeout(self, timeout_s: float) -> None:
        self.sock.settimeout(timeout_s)

    def shut_sending(self) -> None:
        """Shut down the sending direction; receiving still works."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def cut_off(self) -> None:
        """End the connection at once; who waits on it notices, and closes it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; this wakes threads that wait on it."""
        self.cut_off()
        self.sock.close()


class TlsStream(Stream):
    """A connected socket under TLS."""

    is_ready = False

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, host: str | None = None
    ) -> None:
        """``host``: name of the server to connect to; None: this side is the server."""
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=host is None, server_hostname=host
        )
        self._tls_lock = threading.Lock()
        self._unsent = memoryview(b"")

    @property
    def has_unsent(self) -> bool:  # type: ignore[override]
        return bool(len(self._unsent) or self._outgoing.pending)

    def receive_into(self, buffer: memoryview) -> int:
        while (num_bytes := self._decrypt(buffer)) is None:
            self._feed(self.sock.recv(RAW_BYTES))
        return num_bytes

    def receive_now(self, buffer: memoryview) -> int:
        if (num_bytes := self._decrypt(buffer)) is None:
            self._feed(_receive_now(self.sock))
            num_bytes = self._decrypt(buffer)
        if num_bytes is None:
            raise BlockingIOError
        return num_bytes

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Read decrypted bytes; return 0 at the end of the stream, None if more input is needed."""
        with self._tls_lock:
            try:
                return cast(int, self._tls.read(len(buffer), buffer))
            except ssl.SSLWantReadError:
                if self._outgoing.pending > MAX_UNASKED_BYTES:
                    raise ConnectionAbortedError("requests new keys without end") from None
                return None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def _feed(self, data: bytes) -> None:
        self.raw_bytes_received += len(data)
        with self._tls_lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def send(self, parts: Sequence[memoryview]) -> int:
        taken = self._encrypt(parts)
        if len(self._unsent):
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        return taken

    def send_now(self, parts: Sequence[memoryview]) -> int:
        taken = self._encrypt(parts)
        try:
            if len(self._unsent):
                self._unsent = self._unsent[os.write(self.sock.fileno(), self._unsent) :]
        except BlockingIOError:
            if not taken:
                raise
        return taken

    def _encrypt(self, parts: Sequence[memoryview]) -> int:
        """Encrypt some bytes if all earlier ones are sent; return how many."""
        if len(self._unsent):
            return 0
        # Joined, so that a message's head and the start of its file share a TLS record.
        plain = b"".join(part[:RAW_BYTES] for part in parts)[:RAW_BYTES]
        with self._tls_lock:
            taken = self._tls.write(plain) if plain else 0
            self._unsent = memoryview(self._outgoing.read())
        return taken

    def do_handshake(self) -> bool:
        """Continue the handshake with the bytes received so far; return whether it is complete.

        The caller then sends the pending output, also after a failure.
        """
        with self._tls_lock:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
        self.is_ready = True
        return True

    def do_handshake_now(self) -> bool:
        """Continue the handshake without waiting; return whether it is complete.

        Raises:
            BlockingIOError: no bytes have arrived, or the peer reads none.
            ssl.SSLError, OSError: it failed.
        """
        self._feed(_receive_now(self.sock))
        try:
            done = self.do_handshake()
        except ssl.SSLError:
            with contextlib.suppress(OSError):  # the alert is a courtesy
                self.send_now([])
            raise
        if self.has_unsent:
            self.send_now([])
        return done

    def finish_handshake(self) -> None:
        """Run the handshake to its end.

        Raises:
            TimeoutError, OSError: as in ``receive_into``.
            ssl.SSLError: the handshake failed.
        """
        done = False
        while not done:
            try:
                done = self.do_handshake()
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the alert is a courtesy
                    self.send([])
                raise
            while self.has_unsent:
                self.send([])
            if not done:
                self._feed(self.sock.recv(RAW_BYTES))
        der = self._tls.getpeercert(binary_form=True)
        self.certificate = certificate_hash(der or b"")


def _receive_now(sock: socket.socket) -> bytes:
    return os.read(sock.fileno(), RAW_BYTES)  # the descriptor is non-blocking


def start_tls(
    sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float
) -> TlsStream:
    """Start TLS with the server ``host``, and verify that its certificate is for that name.

    Raises:
        AuthError: the certificate is not trusted, or the server does not speak TLS 1.3.
        TimeoutError, OSError: the connection is lost, or its bytes were damaged.
    """
    # An IPv6 address may end in %interface.
    stream = TlsStream(sock, context, host=host.partition("%")[0])
    stream.set_timeout(timeout_s)
    try:
        stream.finish_handshake()
    except OSError as error:
        stream.close()
        if (
            not isinstance(error, ssl.SSLError)
            or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
            or any(words in tls_reason(error) for words in _DAMAGE)
        ):
            raise
        raise AuthError(_handshake_failure(error, host)) from error
    return stream


def _handshake_failure(error: OSError, host: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of the server at {host} is not to be trusted:"
            f" {error.verify_message}; see --tls-ca"
        )
    assert isinstance(error, ssl.SSLError)
    return (
        f"the server at {host} does not speak TLS 1.3 with us ({tls_reason(error)}): start it with"
        " --tls-cert and --tls-key, or leave out --tls-ca"
    )


def tls_reason(error: ssl.SSLError) -> str:
    """Return OpenSSL's reason for an error, as lower-case words."""
    return (error.reason or str(error)).replace("_", " ").lower()


def is_refusal(error: ssl.SSLError) -> bool:
    """Return whether TLS failed because the peer does not trust our certificate."""
    words = tls_reason(error)
    return "alert" in words and any(w in words for w in ("certificate", "unknown ca", "denied"))


def speaks_tls(sock: socket.socket) -> bool:
    """Return whether a peer's first byte starts a TLS handshake."""
    return sock.recv(1, socket.MSG_PEEK) in (b"\x16", b"")
