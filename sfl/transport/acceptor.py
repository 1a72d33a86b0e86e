"""The thread that accepts connections, and hands on those that have shown who they are.

When too many wait to do so, one of them, drawn at random, makes room: so those who never come to
the point cannot keep out those who do.
"""

import contextlib
import random
import selectors
import socket
import threading
import time
from collections.abc import Callable

from sfl.errors import AuthError, Damaged, OtherVersion, ProtocolError, reason_of
from sfl.transport.guard import Guard
from sfl.transport.listener import Listener
from sfl.transport.pending import LET_IN_WITHIN_S, PendingConnection
from sfl.transport.refusal_log import RefusalLog
from sfl.wire.framing import RELEASES, VERSION
from sfl.wire.link import last_words_for
from sfl.wire.messages import MessageType

ACCEPTED_PER_S = 1000  # at most; more wait in the system's queue, and leave us time to train
ACCEPTED_AT_ONCE = 16
LOOK_EVERY_S = 0.25  # at the time


class Acceptor:
    """The thread that accepts connections, and hands on those that are let in."""

    def __init__(
        self,
        listener: Listener,
        guard: Guard,
        admit: Callable[[PendingConnection], None],
        refusals: RefusalLog,
    ) -> None:
        """``admit`` is given each connection that is let in; ``refusals`` why others are not."""
        listener.do_not_wait()
        self._listener, self._guard, self._admit = listener, guard, admit
        self._refusals = refusals
        self._pending: set[PendingConnection] = set()
        self._selector = selectors.DefaultSelector()
        self._closing, self._closed = socket.socketpair()
        self._accepts_from = self._looked_at = 0.0  # a time; the former after a crowd has come
        self._thread = threading.Thread(target=self._run, name="acceptor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and send everybody away who is not let in yet."""
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
                    elif key.data in self._pending:  # and not just sent away for another one
                        self._go_on(key.data)
                self._check_deadlines()
        finally:
            for one in list(self._pending):
                self._let_go(one)
            self._listener.close()
            self._selector.close()
            self._closed.close()

    def _accept(self) -> None:
        """Accept those who connect, but not all of a crowd at once."""
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
            one = PendingConnection(sock, self._guard)
            self._selector.register(sock, selectors.EVENT_READ, one)
        except OSError:
            sock.close()
            raise
        self._pending.add(one)

    def _make_room(self) -> None:
        leaving = [one for one in self._pending if one.leaves]
        one = random.choice(leaving or list(self._pending))
        self._refusals.add(one.address, "made room for others", aloud=False)
        self._let_go(one)

    def _go_on(self, one: PendingConnection) -> None:
        """See to one of whom something has come; whatever it is, the others do not notice it."""
        try:
            if one.leaves:
                if one.has_left():
                    self._let_go(one)
            elif one.go_on():
                self._let_in(one)
        except Exception as error:  # noqa: BLE001 - the edge of one connection
            self._refuse(one, error)

    def _refuse(self, one: PendingConnection, error: Exception) -> None:
        if one.leaves:
            self._let_go(one)
            return
        aloud = isinstance(error, AuthError | ProtocolError)
        self._refusals.add(one.address, reason_of(error), aloud=aloud)
        if isinstance(error, OtherVersion):
            one.version = error.version if error.version in RELEASES else VERSION
            one.dismiss(MessageType.INVALID_MESSAGE, error.answer)
        elif isinstance(error, AuthError | ProtocolError | Damaged):
            one.dismiss(last_words_for(error), str(error))
        else:
            self._let_go(one)

    def _let_in(self, one: PendingConnection) -> None:
        self._pending.discard(one)
        self._selector.unregister(one.stream.sock)
        try:
            self._admit(one)
        except (OSError, RuntimeError):  # it is gone again, or no thread is left for it
            one.stream.close()

    def _let_go(self, one: PendingConnection) -> None:
        self._pending.discard(one)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(one.stream.sock)
        one.stream.close()

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._accepts_from and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for one in [p for p in self._pending if now > p.deadline]:
            self._refuse(one, ProtocolError(f"register within {LET_IN_WITHIN_S:g} seconds"))
        self._refusals.summarise(now)

    @property
    def _pause_s(self) -> float:
        """For how long to wait, at most, until connections are accepted again."""
        return max(self._accepts_from - time.monotonic(), 0) or LOOK_EVERY_S
