"""A thread that reads many connections, and a way for other threads to wait for messages."""

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from sfl.transport.polling import poll

T = TypeVar("T")
TICK_S = 0.5  # how often to check for silent connections


class Readable(Protocol):
    """A connection that can be read without blocking."""

    def fileno(self) -> int: ...

    def read_now(self) -> bool:
        """Read available bytes; return whether more may be available."""

    def check_silence(self) -> None:
        """Mark the connection as failed if it has been silent for too long."""


class SocketReader:
    """Reads connections, and lets threads wait for messages. Closed by ``close``.

    ``lock`` guards the state that ``wait`` waits for; code that changes it calls ``notify``.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._reading = threading.Lock()  # held while connections are read; taken before ``lock``
        self._selector = selectors.DefaultSelector()
        self._members: set[Readable] = set()
        self._unfinished: set[Readable] = set()  # may have more to read: not waited for
        self._paused: set[Readable] = set()
        self._closed = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def add(self, connection: Readable) -> None:
        """Start reading a connection, including bytes that are already there."""
        with self._reading:
            if not self._closed:
                self._members.add(connection)
                self._start_reading(connection)

    def remove(self, connection: Readable) -> None:
        """Stop reading a connection; repeated calls are allowed.

        Call it before closing: a closed descriptor may already belong to another connection.
        """
        with self._reading:
            self.pause(connection)
            self._members.discard(connection)
            self._paused.discard(connection)

    def pause(self, connection: Readable) -> None:
        """Stop reading a connection until ``resume``.

        Only for a connection's own ``read_now`` and ``check_silence``, and for ``remove``.
        """
        if connection in self._members and connection not in self._paused:
            self._selector.unregister(connection.fileno())
            self._paused.add(connection)
        self._unfinished.discard(connection)

    def resume(self, connection: Readable) -> None:
        """Read a paused connection again."""
        with self._reading:
            if connection in self._paused:
                self._paused.remove(connection)
                self._start_reading(connection)

    def notify(self) -> None:
        """Wake threads in ``wait``; the caller holds ``lock``."""
        self.changed.notify_all()

    def wait(self, ready: Callable[[], T], timeout_s: float | None = None) -> T:
        """Return ``ready()`` once it is true, after ``timeout_s``, or when the reader closes."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.lock:
            while not (found := ready()) and not self._closed:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self.changed.wait(left_s)
        return found

    def close(self) -> None:
        """Stop the thread, and wake threads in ``wait``."""
        with self.lock:
            self._closed = True
            self.notify()
        self._wake_up()
        self._thread.join()
        with self._reading:
            for members in (self._members, self._paused, self._unfinished):
                members.clear()
            self._selector.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _start_reading(self, connection: Readable) -> None:
        self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
        self._unfinished.add(connection)
        self._wake_up()

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full: it will wake anyway
            os.write(self._wake_writer, b"x")

    def _run(self) -> None:
        looked_at = time.monotonic()
        while not self._closed:
            events = self._selector.select(0) if self._unfinished else self._select()
            with self._reading:
                self._read({key.data for key, _ in events} | self._unfinished)
                if time.monotonic() - looked_at > TICK_S:
                    looked_at = time.monotonic()
                    for connection in list(self._members):
                        connection.check_silence()

    def _select(self) -> list[tuple[selectors.SelectorKey, int]]:
        return poll(self._select_now) or self._selector.select(TICK_S)

    def _select_now(self) -> list[tuple[selectors.SelectorKey, int]]:
        if not (events := self._selector.select(0)):
            raise BlockingIOError
        return events

    def _read(self, due: set[Readable | None]) -> None:
        for connection in due:
            if connection is None:
                os.read(self._wake_reader, 4096)
            elif connection in self._members and connection not in self._paused:
                self._unfinished.discard(connection)
                if connection.read_now():
                    self._unfinished.add(connection)
