"""A link that is slower than this machine's: a TCP proxy with a delay and a rate.

What one side sends arrives at the other ``delay_s`` later, at ``bytes_per_s`` at most, each
direction by itself.
"""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

CHUNK = 16 * 2**10  # bytes
MAX_ON_THE_WAY = 1024  # chunks; then TCP holds the sender back


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


class _Pipe:
    """One direction of a connection: a thread that reads and a thread that delivers."""

    def __init__(
        self, source: socket.socket, target: socket.socket, delay_s: float, bytes_per_s: float
    ) -> None:
        self._source, self._target = source, target
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
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
            free_at = max(free_at, time.monotonic()) + len(data) / self._bytes_per_s
            self._on_the_way.put((free_at + self._delay_s, data))

    def _deliver(self) -> None:
        while True:
            due_at, data = self._on_the_way.get()
            time.sleep(max(due_at - time.monotonic(), 0))
            if not data:
                _shut(self._target, socket.SHUT_WR)
                return
            try:
                self._target.sendall(data)
            except OSError:  # the reader goes on, so that nobody waits for a place
                _shut(self._source, socket.SHUT_RD)


@contextlib.contextmanager
def slow_link(
    host: str, port: int, *, delay_s: float, bytes_per_s: float = float("inf")
) -> Iterator[str]:
    """Offer an address of this machine that leads to ``host:port`` over a slow link."""
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, port))
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sockets.append(sock)
                _Pipe(near, far, delay_s, bytes_per_s)
                _Pipe(far, near, delay_s, bytes_per_s)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        _shut(listener, socket.SHUT_RDWR)
        listener.close()
        for sock in sockets:
            sock.close()
