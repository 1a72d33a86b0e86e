"""Reading many connections in one thread, and letting other threads wait for what comes."""

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from sfl.transport.polling import poll

T = TypeVar("T")
TICK_S = 0.5  # how often to look for who is silent


class Readable(Protocol):
    """A connection that is read without waiting."""

    def fileno(self) -> int: ...

    def read_now(self) -> bool:
        """Read what has come; return whether there may be more than was read."""

    def check_silence(self) -> None:
        """Fail if nothing has come for too long."""


class SocketReader:
    """Reads connections, and lets threads wait for what comes. Closed by ``close``.

    ``lock`` guards what ``wait`` waits for; whoever changes it calls ``notify``, holding it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._reading = threading.Lock()  # held while connections are read; taken before ``lock``
        self._selector = selectors.DefaultSelector()
        self._members: set[Readable] = set()
        self._unfinished: set[Readable] = set()  # to be read without waiting for their sockets
        self._paused: set[Readable] = set()
        self._closed = False
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wake, False)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def add(self, connection: Readable) -> None:
        """Read a connection from now on, beginning with what has come already."""
        with self._reading:
            if not self._closed:
                self._members.add(connection)
                self._begin(connection)

    def remove(self, connection: Readable) -> None:
        """Read a connection no longer; to be called before it is closed, and as often as you like.

        Else its descriptor might already be another one's when it is read.
        """
        with self._reading:
            self.pause(connection)
            self._members.discard(connection)
            self._paused.discard(connection)

    def pause(self, connection: Readable) -> None:
        """Read a connection no longer until ``resume``.

        For a connection's own ``read_now`` and ``check_silence``, and for ``remove``.
        """
        if connection in self._members and connection not in self._paused:
            self._selector.unregister(connection.fileno())
            self._paused.add(connection)
        self._unfinished.discard(connection)

    def resume(self, connection: Readable) -> None:
        """Read a connection again, beginning with what has come in the meantime."""
        with self._reading:
            if connection in self._paused:
                self._paused.remove(connection)
                self._begin(connection)

    def notify(self) -> None:
        """Let those who wait look again; to be called with ``lock``."""
        self.changed.notify_all()

    def wait(self, ready: Callable[[], T], timeout_s: float | None = None) -> T:
        """Return what ``ready`` finds, once that is true, or after ``timeout_s``, or at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.lock:
            while not (found := ready()) and not self._closed:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self.changed.wait(left_s)
        return found

    def close(self) -> None:
        """Read nothing any more."""
        with self.lock:
            self._closed = True
            self.notify()
        self._wake_up()
        self._thread.join()
        with self._reading:
            for members in (self._members, self._paused, self._unfinished):
                members.clear()
            self._selector.close()
            os.close(self._wakes)
            os.close(self._wake)

    def _begin(self, connection: Readable) -> None:
        self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
        self._unfinished.add(connection)
        self._wake_up()

    def _wake_up(self) -> None:
        """Let the thread look for what is to be read."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            os.write(self._wake, b"x")

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
                os.read(self._wakes, 4096)
            elif connection in self._members and connection not in self._paused:
                self._unfinished.discard(connection)
                if connection.read_now():
                    self._unfinished.add(connection)
