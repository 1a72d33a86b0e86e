"""A thread that accepts connections and passes on those that authenticate.

When too many are pending, a random one is closed: idle connections cannot lock out others.
"""

import contextlib
import random
import selectors
import socket
import threading
import time
from collections.abc import Callable

from sfl.errors import AuthError, Damaged, NotYet, OtherVersion, ProtocolError, reason_of
from sfl.transport.guard import Guard
from sfl.transport.listener import Listener
from sfl.transport.pending import LET_IN_WITHIN_S, PendingConnection
from sfl.transport.refusal_log import RefusalLog
from sfl.wire.framing import RELEASES, VERSION
from sfl.wire.link import last_words_for
from sfl.wire.messages import MessageType

ACCEPTED_PER_S = 1000  # at most; more wait in the system's queue, which leaves time for training
ACCEPTED_AT_ONCE = 16
LOOK_EVERY_S = 0.25  # interval for checking deadlines


class Acceptor:
    """A thread that accepts connections and passes on those that are admitted."""

    def __init__(
        self,
        listener: Listener,
        guard: Guard,
        admit: Callable[[PendingConnection], None],
        refusals: RefusalLog,
    ) -> None:
        """``admit`` is called with each admitted connection; ``refusals`` logs the others."""
        listener.set_nonblocking()
        self._listener, self._guard, self._admit = listener, guard, admit
        self._refusals = refusals
        self._pending: set[PendingConnection] = set()
        self._selector = selectors.DefaultSelector()
        self._closing, self._closed = socket.socketpair()
        self._accepts_from = self._looked_at = 0.0  # times; the first paces accepting
        self._thread = threading.Thread(target=self._run, name="acceptor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and close all pending connections."""
        self._closing.close()
        self._thread.join()

    def _run(self) -> None:
        self._selector.register(self._closed, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in self._selector.select(min(LOOK_EVERY_S, self._pause_s)):
                    if key.fileobj is self._closed:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data in self._pending:  # not closed by _make_room just now
                        self._process(key.data)
                self._check_deadlines()
        finally:
            for pending in list(self._pending):
                self._close_one(pending)
            self._listener.close()
            self._selector.close()
            self._closed.close()

    def _accept(self) -> None:
        """Accept some connections, then pause so as to stay below ``ACCEPTED_PER_S``."""
        accepted, pause_s = 0, 0.0
        try:
            while accepted < ACCEPTED_AT_ONCE and (sock := self._listener.accept()):
                accepted += 1
                self._add(sock)
        except OSError:  # too many files are open
            pause_s = LOOK_EVERY_S
        self._selector.unregister(self._listener)
        self._accepts_from = time.monotonic() + max(accepted / ACCEPTED_PER_S, pause_s)

    def _add(self, sock: socket.socket) -> None:
        while len(self._pending) >= self._guard.max_pending:
            self._make_room()
        try:
            pending = PendingConnection(sock, self._guard)
            self._selector.register(sock, selectors.EVENT_READ, pending)
        except OSError:
            sock.close()
            raise
        self._pending.add(pending)

    def _make_room(self) -> None:
        leaving = [pending for pending in self._pending if pending.is_dismissed]
        pending = random.choice(leaving or list(self._pending))
        self._refusals.add(pending.address, "made room for others", on_console=False)
        self._close_one(pending)

    def _process(self, pending: PendingConnection) -> None:
        """Process a connection's new bytes; its errors affect no other connection."""
        try:
            if pending.is_dismissed:
                if pending.has_closed():
                    self._close_one(pending)
            elif pending.process():
                self._admit_one(pending)
        except Exception as error:  # noqa: BLE001 - the edge of one connection
            self._refuse(pending, error)

    def _refuse(self, pending: PendingConnection, error: Exception) -> None:
        """Turn a connection away, with the reason if it is of any use."""
        try:
            self._tell(pending, error)
        except Exception:  # noqa: BLE001 - the edge of one connection
            self._close_one(pending)

    def _tell(self, pending: PendingConnection, error: Exception) -> None:
        if pending.is_dismissed:
            self._close_one(pending)
            return
        on_console = isinstance(error, AuthError | ProtocolError | NotYet)
        self._refusals.add(pending.address, reason_of(error), on_console=on_console)
        if isinstance(error, OtherVersion):
            pending.version = error.version if error.version in RELEASES else VERSION
            pending.dismiss(MessageType.INVALID_MESSAGE, error.answer)
        elif isinstance(error, AuthError | ProtocolError | Damaged | NotYet):
            pending.dismiss(last_words_for(error), str(error))
        else:
            self._close_one(pending)

    def _admit_one(self, pending: PendingConnection) -> None:
        self._pending.discard(pending)
        self._selector.unregister(pending.stream.sock)
        try:
            self._admit(pending)
        except (OSError, RuntimeError):  # it has disconnected, or no thread can be started
            pending.stream.close()

    def _close_one(self, pending: PendingConnection) -> None:
        self._pending.discard(pending)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(pending.stream.sock)
        pending.stream.close()

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._accepts_from and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for pending in [p for p in self._pending if now > p.deadline]:
            # It may be the network's fault: whoever is slow for that may come again.
            self._refuse(pending, NotYet(f"register within {LET_IN_WITHIN_S:g} seconds"))
        self._refusals.summarise(now)

    @property
    def _pause_s(self) -> float:
        """Seconds until connections are accepted again; at most ``LOOK_EVERY_S`` if they are."""
        return max(self._accepts_from - time.monotonic(), 0) or LOOK_EVERY_S
