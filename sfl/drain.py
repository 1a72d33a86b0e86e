"""Reading many connections: by the thread that waits for a message, else by one of its own.

A message that a thread waits for is read by that thread: to hand it over from one thread to another
costs more than to read it. When nobody has waited for a while, since the server computes, a thread
of the drain reads what comes, so that no client's sending waits for another one's long step. For
less, the system's own buffers hold what they can: a thread that woke up for it would take the
interpreter, and the core's caches, from who computes.
"""

import contextlib
import functools
import os
import selectors
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from sfl.spin import Spinner

T = TypeVar("T")
Events = list[tuple[selectors.SelectorKey, int]]
TICK_S = 0.5  # how often to look for who is silent
UNREAD_S = 20e-3  # once to twice so long nobody has to wait before the drain's thread reads


class Drained(Protocol):
    """A connection that is read without waiting."""

    def fileno(self) -> int: ...

    def read_now(self) -> bool:
        """Read what has come; return whether there may be more than was read."""

    def check_silence(self) -> None:
        """Fail if nothing has come for too long."""


class Drain:
    """Reads connections, and lets threads wait for what comes. Closed by ``close``.

    ``lock`` guards what ``wait`` waits for; whoever changes it calls ``notify``, holding it.
    ``meanwhile`` is what to do while nothing comes, see ``Spinner``.
    """

    def __init__(self, meanwhile: Callable[[], bool] = lambda: False) -> None:
        self.lock = threading.RLock()  # taken by itself: a condition's ``with`` runs Python
        self.changed = threading.Condition(self.lock)
        self._reading = threading.Lock()  # one thread at a time; taken before ``lock``
        self._selector = selectors.DefaultSelector()
        self._members: set[Drained] = set()
        self._unfinished: set[Drained] = set()
        self._paused: set[Drained] = set()
        self._leader: int | None = None  # the thread that waits and reads
        self._left = threading.Event()  # somebody waits no longer, since the thread last looked
        self._looked_at = 0.0
        self.spinner = Spinner(meanwhile)  # of the leader
        self._closed = False
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wake, False)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._left.set()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def add(self, connection: Drained) -> None:
        """Read a connection from now on, beginning with what has come already."""
        with self._reading:
            if not self._closed:
                self._members.add(connection)
                self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
                self._read(connection)

    def remove(self, connection: Drained) -> None:
        """Read a connection no longer; to be called before it is closed, and as often as you like.

        Else its descriptor might already be another one's when it is read.
        """
        with self._reading:
            self.pause(connection)
            self._members.discard(connection)
            self._paused.discard(connection)

    def pause(self, connection: Drained) -> None:
        """Read a connection no longer until ``resume``.

        For a connection's own ``read_now`` and ``check_silence``, and for ``remove``.
        """
        if connection in self._members and connection not in self._paused:
            self._selector.unregister(connection.fileno())
            self._paused.add(connection)
        self._unfinished.discard(connection)

    def resume(self, connection: Drained) -> None:
        """Read a connection again, beginning with what has come in the meantime."""
        with self._reading:
            if connection in self._paused:
                self._paused.remove(connection)
                self._selector.register(connection.fileno(), selectors.EVENT_READ, connection)
                self._read(connection)

    def notify(self) -> None:
        """Let those who wait look again; to be called with ``lock``."""
        self.changed.notify_all()
        if self._leader not in (None, threading.get_ident()):
            with contextlib.suppress(BlockingIOError):  # full: it will wake
                os.write(self._wake, b"x")

    def wait(self, ready: Callable[[], T], timeout_s: float | None = None) -> T:
        """Return what ``ready`` finds, once that is true, or after ``timeout_s``."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        leads = False
        with self.lock:
            try:
                while not (found := ready()) and not self._closed:
                    left_s = TICK_S if deadline is None else deadline - time.monotonic()
                    if left_s <= 0:
                        break
                    left_s = min(left_s, TICK_S)
                    if self._leader is None:
                        self._leader, leads = threading.get_ident(), True
                    if not leads:
                        self.changed.wait(left_s)
                        continue
                    self.lock.release()
                    try:
                        self._read_all(self._wait_for_events(left_s))
                    finally:
                        self.lock.acquire()
            finally:
                if leads:
                    self._leader = None
                    self.changed.notify_all()  # another thread that waits may read now
                    if not self._left.is_set():
                        self._left.set()
        return found

    def _run(self) -> None:
        while not self._closed:
            self._left.wait()
            self._left.clear()
            time.sleep(UNREAD_S)
            while not (self._leader or self._left.is_set() or self._closed):
                events = self._selector.select(0 if self._unfinished else UNREAD_S)
                if self._leader is None:  # else it sees them, too
                    self._read_all(events)

    def _read_all(self, events: Events) -> None:
        """Read what there is to read."""
        with self._reading:
            due = self._unfinished | {key.data for key, _ in events}
            for connection in due:
                if connection is None:
                    self._take_wakes()
                elif connection in self._members and connection not in self._paused:
                    self._read(connection)
            if time.monotonic() - self._looked_at > TICK_S:
                self._looked_at = time.monotonic()
                for connection in list(self._members):
                    connection.check_silence()

    def _wait_for_events(self, timeout_s: float) -> Events:
        """Return what there is to read, waiting for it for so long; for the leader."""
        look, sleep = self._selector.select, functools.partial(self._selector.select, timeout_s)
        return look(0) if self._unfinished else self.spinner.wait(lambda: look(0) or None, sleep)

    def _take_wakes(self) -> None:
        """Empty the pipe, unless it is for another thread."""
        with self.lock:  # nobody becomes the leader, and is woken, in between
            if self._leader in (None, threading.get_ident()):
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakes, 4096)

    def _read(self, connection: Drained) -> None:
        self._unfinished.discard(connection)
        if connection.read_now():
            self._unfinished.add(connection)

    def close(self) -> None:
        """Read nothing any more."""
        with self.lock:
            self._closed = True
            os.write(self._wake, b"x")
            self.changed.wait_for(lambda: self._leader is None)
            self._left.set()
        self._thread.join()
        with self._reading:
            for members in (self._members, self._paused, self._unfinished):
                members.clear()
            self._selector.close()
            os.close(self._wakes)
            os.close(self._wake)
