"""A link that is worse than this machine's: a TCP proxy with a delay, a rate, cuts and blackouts.

What one side sends arrives at the other ``delay_s`` later, at ``bytes_per_s`` at most, each
direction by itself. A connection breaks when as many bytes have passed as ``cut_after`` drew for
it. While the link is dark nothing arrives, and nobody is told.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

CHUNK = 16 * 2**10  # bytes
MAX_ON_THE_WAY = 1024  # chunks; then TCP holds the sender back
UNCUT = float("inf")


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


class _Pipe:
    """One direction of a connection: a thread that reads and a thread that delivers."""

    def __init__(self, source: socket.socket, target: socket.socket, link: "SlowLink") -> None:
        self._source, self._target, self._link = source, target, link
        self._left = link.cut_after()  # bytes that pass before the connection breaks
        self._on_the_way: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_ON_THE_WAY)
        for run in (self._read, self._deliver):
            threading.Thread(target=run, daemon=True).start()

    def _read(self) -> None:
        free_at = 0.0  # when the link has taken what it was given so far
        data = b"-"
        while data:
            try:
                data = self._source.recv(CHUNK)
            except OSError:
                data = b""
            free_at = max(free_at, time.monotonic()) + len(data) / self._link.bytes_per_s
            self._on_the_way.put((free_at + self._link.delay_s, data))

    def _deliver(self) -> None:
        while True:
            due_at, data = self._on_the_way.get()
            while (wait_s := max(due_at, self._link.dark_until) - time.monotonic()) > 0:
                time.sleep(wait_s)
            if not data:
                _shut(self._target, socket.SHUT_WR)
                return
            passes = data[: int(min(self._left, len(data)))]
            self._left -= len(passes)
            try:
                self._target.sendall(passes)
            except OSError:  # the reader goes on, so that nobody waits for a place
                _shut(self._source, socket.SHUT_RD)
            if len(passes) < len(data):
                self._link.count_cut()
                for sock in (self._source, self._target):
                    _shut(sock, socket.SHUT_RDWR)
                return


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
    ) -> None:
        self.delay_s, self.bytes_per_s, self.cut_after = delay_s, bytes_per_s, cut_after
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

    def count_cut(self) -> None:
        with self._lock:
            self.num_cut += 1

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
                _Pipe(near, far, self)
                _Pipe(far, near, self)

    def close(self) -> None:
        _shut(self._listener, socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            _shut(sock, socket.SHUT_RDWR)
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
