"""Emulation of slow links inside the program: rate, delay, jitter and broken connections.

``--link 100mbit,50ms`` on either side shapes both directions of that side's connections, for
studies and tests, without root. Per direction two threads forward the bytes when they are due::

    the program <-> near end of a socket pair | far end <-> Pipe, Pipe <-> the real socket
"""

import contextlib
import math
import queue
import socket
import struct
import threading
import time
from typing import Protocol

from sfl.values import LinkShape

UNSHAPED = LinkShape()
CHUNK = 16 * 2**10  # bytes
MIN_ON_THE_WAY = 1024  # chunks in transit; beyond that TCP slows the sender down
LINGER_S = 10.0  # how long the peer may still send after our last byte
# SO_LINGER value that makes close() send a reset. After an ordinary close a peer with a full send
# window would probe a socket in TIME_WAIT until its own timeout.
_RESET = struct.pack("ii", 1, 0)


class Line(Protocol):
    """The emulated link of a pipe; see ``LinkShape``."""

    @property
    def bytes_per_s(self) -> float: ...

    @property
    def dark_until(self) -> float:
        """The time until which no bytes arrive."""

    def draw_delay_s(self) -> float: ...

    def cut_after(self) -> float:
        """Draw how many bytes pass in one direction before the connection breaks."""

    def count_cut(self) -> None: ...


class Pipe:
    """One direction of a connection: one thread reads, another delivers."""

    def __init__(self, source: socket.socket, target: socket.socket, line: Line) -> None:
        self._source, self._target, self._line = source, target, line
        self._left = line.cut_after()  # bytes until the connection breaks
        self._is_cut = False
        in_flight = min(line.bytes_per_s * line.draw_delay_s() * 2 / CHUNK, 2**16)
        most = MIN_ON_THE_WAY if math.isnan(in_flight) else max(MIN_ON_THE_WAY, int(in_flight))
        self._on_the_way: queue.Queue[tuple[float, bytes]] = queue.Queue(most)
        self.ended = threading.Event()
        for run in (self._read, self._deliver):
            threading.Thread(target=run, name="pipe", daemon=True).start()

    def _read(self) -> None:
        free_at = due_at = 0.0  # when the line has accepted, and delivered, all bytes so far
        data = b"-"
        while data:
            try:
                data = b"" if self._is_cut else self._source.recv(CHUNK)
            except OSError:
                data = b""
            free_at = max(free_at, time.monotonic()) + len(data) / self._line.bytes_per_s
            due_at = max(due_at, free_at + self._line.draw_delay_s())
            self._on_the_way.put((due_at, data))

    def _deliver(self) -> None:
        try:
            while self._deliver_one():
                pass
        finally:
            self.ended.set()

    def _deliver_one(self) -> bool:
        """Deliver the next chunk when it is due; return whether more may follow."""
        due_at, data = self._on_the_way.get()
        while (wait_s := max(due_at, self._line.dark_until) - time.monotonic()) > 0:
            time.sleep(wait_s)
        if not data:
            shut(self._target, socket.SHUT_WR)
            return False
        passes = data[: int(min(self._left, len(data)))]
        self._left -= len(passes)
        try:
            self._target.sendall(passes)
        except OSError:  # the delivery loop continues, so that the reader never blocks
            shut(self._source, socket.SHUT_RD)
        if len(passes) < len(data):
            self._line.count_cut()
            self._is_cut = True  # a socket that is shut down can still return bytes
            for sock in (self._source, self._target):
                with contextlib.suppress(OSError):  # already closed
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                shut(sock, socket.SHUT_RDWR)
            while self._on_the_way.get()[1]:  # drain the queue: the reader may block on it
                pass
            return False
        return True


def shut(sock: socket.socket, how: int) -> None:
    """Shut a socket down; ignore one that is already."""
    with contextlib.suppress(OSError):
        sock.shutdown(how)


class _NearEnd(socket.socket):
    """Our end of a connection that others carry; it reports the real peer's address."""

    peer: object = None

    def getpeername(self) -> object:
        return self.peer


def near_end(peer: object) -> tuple[socket.socket, socket.socket]:
    """Return a socket pair whose first socket reports this address as its peer's."""
    ours, far = socket.socketpair()
    near = _NearEnd(ours.family, ours.type, ours.proto, fileno=ours.detach())
    near.peer = peer
    return near, far


def shaped(sock: socket.socket, shape: LinkShape) -> socket.socket:
    """Return a socket to the peer of ``sock``, over a link of this shape.

    ``sock`` is closed when both directions have ended.
    """
    if not shape.shapes:
        return sock
    try:
        peer = sock.getpeername()
    except OSError as error:  # already disconnected
        sock.close()
        raise ConnectionAbortedError(*error.args) from error
    sock.setblocking(True)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    near, far = near_end(peer)
    up, down = Pipe(far, sock, shape), Pipe(sock, far, shape)

    def close() -> None:
        up.ended.wait()  # until we close, or shut down sending
        down.ended.wait(LINGER_S + 2 * shape.delay_s)
        for end in (far, sock):
            shut(end, socket.SHUT_RDWR)
        down.ended.wait()
        far.close()
        sock.close()

    threading.Thread(target=close, name="shaping", daemon=True).start()
    return near
