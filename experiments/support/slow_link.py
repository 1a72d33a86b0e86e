"""A link that is worse than this machine's: a TCP proxy with a delay, a rate, cuts and blackouts.

What one side sends arrives at the other ``delay_s`` later, at ``bytes_per_s`` at most, each
direction by itself. A connection breaks when as many bytes have passed as ``cut_after`` drew for
it; of the byte that follows as many as ``flip_after`` drew, one bit is flipped. While the link is
dark nothing arrives, and nobody is told.
"""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

from sfl.transport.shaping import Pipe, shut
from sfl.values import UNCUT


class _Noisy:
    """A socket from which one bit arrives flipped, after so many bytes."""

    def __init__(self, sock: socket.socket, after: float, count: Callable[[], None]) -> None:
        self._sock, self._left, self._count = sock, after, count

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        left, self._left = self._left, self._left - len(data)
        if not 0 <= left < len(data):
            return data
        self._count()
        changed = bytearray(data)
        changed[int(left)] ^= 1 << random.randrange(8)
        return bytes(changed)

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


class SlowLink:
    """An address of this machine that leads to ``host:port`` over such a link."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        delay_s: float = 0.0,
        bytes_per_s: float = float("inf"),
        cut_after: Callable[[], float] = lambda: UNCUT,
        flip_after: Callable[[], float] = lambda: UNCUT,
    ) -> None:
        self.delay_s, self.bytes_per_s, self.cut_after = delay_s, bytes_per_s, cut_after
        self._flip_after = flip_after
        self.num_flipped = 0
        self.dark_until = 0.0
        self.num_cut = 0
        self._far = host, port
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def go_dark(self, seconds: float) -> None:
        """Let nothing arrive for a while."""
        self.dark_until = time.monotonic() + seconds

    def draw_delay_s(self) -> float:
        return self.delay_s

    def count_cut(self) -> None:
        with self._lock:
            self.num_cut += 1

    def count_flip(self) -> None:
        with self._lock:
            self.num_flipped += 1

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._far)
                except OSError:  # the server is not there
                    near.close()
                    continue
                self._sockets = [s for s in self._sockets if s.fileno() >= 0]
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._sockets.append(sock)
                for source, target in ((near, far), (far, near)):
                    Pipe(_Noisy(source, self._flip_after(), self.count_flip), target, self)

    def close(self) -> None:
        shut(self._listener, socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            shut(sock, socket.SHUT_RDWR)
            sock.close()


@contextlib.contextmanager
def slow_link(
    host: str, port: int, *, delay_s: float, bytes_per_s: float = float("inf")
) -> Iterator[str]:
    """Offer an address that leads to ``host:port`` over a slow link, while it is open."""
    link = SlowLink(host, port, delay_s=delay_s, bytes_per_s=bytes_per_s)
    try:
        yield link.address
    finally:
        link.close()
