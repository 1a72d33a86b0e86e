"""Connections over something that has no sockets: a thread carries the bytes of socket pairs.

Everything above sees an ordinary socket, and so keeps its limits, deadlines and counters::

    the program <-> near end of a socket pair | far end <-> End <-> Way <-> the peer's
"""

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from sfl.transport.shaping import near_end, shaped, shut
from sfl.values import LinkShape

CHUNK = 256 * 2**10  # bytes in one piece; a longer one is refused before memory is taken for it
_SHORTEST_S, _LONGEST_S = 50e-6, 1e-3  # pauses between two looks at the ways
_END_WITHIN_S = 2.0


class Way(Protocol):
    """Carries one connection's bytes to its peer and back, in order; no method blocks."""

    def put(self, data: bytes) -> None:
        """Begin to send a piece, once the last ``has_left``; an empty one ends this direction."""

    def has_left(self) -> bool: ...

    def take(self) -> bytes | None:
        """Return the next piece that has arrived; None: there is none yet.

        Raises:
            OSError: the way is broken.
        """


class _End:
    """The far end of a connection's socket pair."""

    def __init__(self, sock: socket.socket, way: Way) -> None:
        sock.setblocking(False)
        self.sock, self._way = sock, way
        self._rest = memoryview(b"")  # arrived, and not yet taken by the program
        self._has_said_all = self._has_heard_all = False

    @property
    def listens(self) -> bool:
        """Whether it can send what the program says."""
        return not self._has_said_all and self._way.has_left()

    @property
    def is_over(self) -> bool:
        return self._has_said_all and self._has_heard_all and self._way.has_left()

    def move(self) -> bool:
        """Carry one piece each way if there is one; return whether there was."""
        return self._carry_out() | self._carry_in()

    def _carry_out(self) -> bool:
        if not self.listens:
            return False
        try:
            data = self.sock.recv(CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._has_said_all = not data
        self._way.put(data)
        return True

    def _carry_in(self) -> bool:
        if not self._rest:
            if self._has_heard_all:
                return False
            try:
                data = self._way.take()
            except OSError:
                data = b""
            if data is None:
                return False
            self._rest, self._has_heard_all = memoryview(data), not data
            if not data:
                shut(self.sock, socket.SHUT_WR)
                return True
        try:
            taken = self.sock.send(self._rest)
        except BlockingIOError:
            return False
        except OSError:  # the program has closed its end
            taken = len(self._rest)
        self._rest = self._rest[taken:]
        return True


class Tunnels:
    """A thread that carries the bytes of this process's connections. Closed by ``close``."""

    def __init__(self, look: Callable[[], bool] = lambda: False) -> None:
        """``look`` is called in each turn of the thread; it says whether there was work to do."""
        self._look = look
        self._ends: list[_End] = []
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="tunnels", daemon=True)
        self._thread.start()

    def open(self, way: Way, peer: str) -> socket.socket:
        """Return the socket of a new connection."""
        near, far = near_end((peer, 0))
        with self._lock:
            self._ends.append(_End(far, way))
        return near

    def close(self) -> None:
        """Carry what is on its way, for up to two seconds, and stop."""
        self._is_closing = True
        self._thread.join()

    def _run(self) -> None:
        pause_s, until = _SHORTEST_S, float("inf")
        try:
            while (self._ends and time.monotonic() < until) or not self._is_closing:
                if self._is_closing:
                    until = min(until, time.monotonic() + _END_WITHIN_S)
                moved = self._look() | self._move()
                pause_s = _SHORTEST_S if moved else min(2 * pause_s, _LONGEST_S)
                if not moved:
                    self._wait(pause_s)
        finally:  # who holds a connection notices
            for end in self._ends:
                end.sock.close()

    def _move(self) -> bool:
        """Carry a piece of each connection each way; return whether there was one."""
        with self._lock:
            ends = list(self._ends)
        moved = False
        for end in ends:
            moved |= end.move()
            if end.is_over:
                end.sock.close()
        with self._lock:
            self._ends = [end for end in self._ends if not end.is_over]
        return moved

    def _wait(self, pause_s: float) -> None:
        """Wait until the program says something, or for so long."""
        poll = select.poll()
        for end in self._ends:
            if end.listens:
                poll.register(end.sock, select.POLLIN)
        poll.poll(pause_s * 1000)


class TunnelListener:
    """Where connections over tunnels arrive. Closed by ``with`` or ``close()``."""

    port = 0

    def __init__(self, address: str, shape: LinkShape) -> None:
        self.address, self._shape = address, shape
        self._arrived: deque[socket.socket] = deque()
        self._waiting, self._bell = socket.socketpair()
        self._waiting.setblocking(False)
        self._bell.setblocking(False)

    def __enter__(self) -> "TunnelListener":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, sock: socket.socket) -> None:
        """Hand on a new connection; called from the tunnels' thread."""
        self._arrived.append(sock)
        with contextlib.suppress(OSError):  # it is full, or closed
            self._bell.send(b"x")

    def set_nonblocking(self) -> None:
        """``accept`` never blocks."""

    def fileno(self) -> int:
        return self._waiting.fileno()

    def accept(self) -> socket.socket | None:
        """Return the socket of the next connection; None: there is none."""
        with contextlib.suppress(BlockingIOError):
            self._waiting.recv(1)
        if not self._arrived:
            return None
        return shaped(self._arrived.popleft(), self._shape)

    def close(self) -> None:
        self._waiting.close()
        self._bell.close()
        while self._arrived:
            self._arrived.popleft().close()
