"""Bytes over a connected socket, in the clear or under TLS.

A ``Stream`` waits for the peer for as long as its timeout says, or not at all. One thread may
receive while another one sends. OpenSSL forbids that for one TLS connection, and a call of its that
reads a socket goes on for as long as a peer feeds it. So a ``TlsStream`` reads and writes the
socket itself, hands OpenSSL bytes in memory, and lets one thread do so at a time::

    socket -> incoming -> OpenSSL -> what the peer said
    socket <- unsent <- outgoing <- OpenSSL <- what we say
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

RAW_BYTES = 64 * 2**10  # that are taken from the socket, or enciphered, at once
# What OpenSSL says of a handshake whose bytes have changed on their way, to which side it may be.
_DAMAGE = (
    "bad record mac", "decode error", "illegal parameter", "unexpected message", "bad length",
    "invalid session id", "bad extension", "bad key share", "digest check failed",
)  # fmt: skip
MAX_UNASKED_BYTES = 64 * 2**10  # that a peer makes us say, by asking for new keys, before we send


class Stream:
    """A connected socket, in the clear."""

    certificate = b""  # hash of the peer's, if it showed one
    is_secured = True  # nothing is left to be agreed on
    has_unsent = False  # whether what was taken is still to be sent

    def __init__(self, sock: socket.socket) -> None:
        # What reads and writes the descriptor itself would bypass TLS.
        assert not isinstance(sock, ssl.SSLSocket)
        self.sock = sock
        self.raw_received = 0  # bytes, of which TLS's own are a part

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes, put them into ``buffer`` and return how many; 0: the peer has ended.

        Raises:
            TimeoutError: none came in time.
            OSError: the connection is broken.
        """
        return self.sock.recv_into(buffer)

    def receive_now(self, buffer: memoryview) -> int:
        """Do as ``receive_into``, but raise ``BlockingIOError`` if nothing has come."""
        num_bytes = os.readv(self.sock.fileno(), [buffer])  # the descriptor is non-blocking
        self.raw_received += num_bytes
        return num_bytes

    def send(self, parts: Sequence[memoryview]) -> int:
        """Send of some bytes as many as fit, waiting until some do; return how many were taken.

        While ``has_unsent`` it is to be called again, with nothing if there is nothing more.

        Raises:
            TimeoutError: the peer took none in time.
            OSError: the connection is broken.
        """
        return self.sock.sendmsg(parts)

    def send_now(self, parts: Sequence[memoryview]) -> int:
        """Do as ``send``, but raise ``BlockingIOError`` if none fit."""
        return os.writev(self.sock.fileno(), parts)

    def set_timeout(self, timeout_s: float) -> None:
        self.sock.settimeout(timeout_s)

    def shut_sending(self) -> None:
        """End our half of the connection; what the peer still sends can be read."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection; a thread that waits on it wakes."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class TlsStream(Stream):
    """A connected socket under TLS."""

    is_secured = False

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, host: str | None = None
    ) -> None:
        """``host`` is the server that we want to reach; None: we are the server."""
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=host is None, server_hostname=host
        )
        self._inside = threading.Lock()
        self._unsent = memoryview(b"")

    @property
    def has_unsent(self) -> bool:  # type: ignore[override]
        return bool(len(self._unsent) or self._outgoing.pending)

    def receive_into(self, buffer: memoryview) -> int:
        while (num_bytes := self._decipher(buffer)) is None:
            self._feed(self.sock.recv(RAW_BYTES))
        return num_bytes

    def receive_now(self, buffer: memoryview) -> int:
        if (num_bytes := self._decipher(buffer)) is None:
            self._feed(_receive_now(self.sock))
            num_bytes = self._decipher(buffer)
        if num_bytes is None:
            raise BlockingIOError
        return num_bytes

    def _decipher(self, buffer: memoryview) -> int | None:
        """Take what has been deciphered; 0 if the peer has ended, None if more must come first."""
        with self._inside:
            try:
                return cast(int, self._tls.read(len(buffer), buffer))
            except ssl.SSLWantReadError:
                if self._outgoing.pending > MAX_UNASKED_BYTES:
                    raise ConnectionAbortedError("asks for new keys without end") from None
                return None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def _feed(self, data: bytes) -> None:
        self.raw_received += len(data)
        with self._inside:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def send(self, parts: Sequence[memoryview]) -> int:
        taken = self._encipher(parts)
        if len(self._unsent):
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        return taken

    def send_now(self, parts: Sequence[memoryview]) -> int:
        taken = self._encipher(parts)
        try:
            if len(self._unsent):
                self._unsent = self._unsent[os.write(self.sock.fileno(), self._unsent) :]
        except BlockingIOError:
            if not taken:
                raise
        return taken

    def _encipher(self, parts: Sequence[memoryview]) -> int:
        """Encipher some bytes, once those before are on their way; return how many."""
        if len(self._unsent):
            return 0
        # A message's head and the beginning of its file go together.
        plain = b"".join(part[:RAW_BYTES] for part in parts)[:RAW_BYTES]
        with self._inside:
            taken = self._tls.write(plain) if plain else 0
            self._unsent = memoryview(self._outgoing.read())
        return taken

    def shake_hands(self) -> bool:
        """Go on with the handshake with what has come; return whether it is done.

        What we have to say is then to be sent, whether it is or has failed.
        """
        with self._inside:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
        self.is_secured = True
        return True

    def shake_hands_now(self) -> bool:
        """Go on with the handshake without waiting; return whether it is done.

        Raises:
            BlockingIOError: nothing has come, or the peer takes nothing.
            ssl.SSLError, OSError: it failed.
        """
        self._feed(_receive_now(self.sock))
        try:
            done = self.shake_hands()
        except ssl.SSLError:
            with contextlib.suppress(OSError):  # to say why is a courtesy
                self.send_now([])
            raise
        if self.has_unsent:
            self.send_now([])
        return done

    def finish_handshake(self) -> None:
        """Wait until the handshake is done.

        Raises:
            TimeoutError, OSError: as ``receive_into``; ssl.SSLError: it failed.
        """
        done = False
        while not done:
            try:
                done = self.shake_hands()
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # to say why is a courtesy
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


def to_server(
    sock: socket.socket, context: ssl.SSLContext, host: str, timeout_s: float
) -> TlsStream:
    """Begin TLS with the server ``host``, whose certificate must be its.

    Raises:
        AuthError: its certificate is not to be trusted, or it does not speak TLS as we do.
        TimeoutError, OSError: the connection is lost, or what came over it has been damaged.
    """
    # An IPv6 address may have its interface behind it.
    stream = TlsStream(sock, context, host=host.partition("%")[0])
    stream.set_timeout(timeout_s)
    try:
        stream.finish_handshake()
    except OSError as error:
        stream.close()
        if (
            not isinstance(error, ssl.SSLError)
            or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
            or any(words in why(error) for words in _DAMAGE)
        ):
            raise
        raise AuthError(_not_agreed(error, host)) from error
    return stream


def _not_agreed(error: OSError, host: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of the server at {host} is not to be trusted:"
            f" {error.verify_message}; see --tls-ca"
        )
    assert isinstance(error, ssl.SSLError)
    return (
        f"the server at {host} does not speak TLS 1.3 with us ({why(error)}): start it with"
        " --tls-cert and --tls-key, or leave out --tls-ca"
    )


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
