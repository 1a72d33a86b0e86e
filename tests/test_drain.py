"""Reading many connections in one thread, and waiting for what comes."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from sfl.transport.drain import Drain

OPEN: list["Bytes"] = []  # that the test is to close


class Bytes:
    """One end of a connection whose bytes are collected."""

    def __init__(self, drain: Drain) -> None:
        self.drain = drain
        self.sock, self.peer = socket.socketpair()
        self.sock.setblocking(False)
        self.got: list[tuple[bytes, str]] = []
        self.room = 10
        drain.add(self)
        OPEN.append(self)

    def fileno(self) -> int:
        return self.sock.fileno()

    def read_now(self) -> bool:
        try:
            data = self.sock.recv(1)
        except BlockingIOError:
            return False
        with self.drain.changed:
            self.got.append((data, threading.current_thread().name))
            self.drain.notify()
            self.room -= 1
            if not self.room:
                self.drain.pause(self)
        return bool(self.room)

    def check_silence(self) -> None:
        pass


@pytest.fixture
def drain() -> Iterator[Drain]:
    drain = Drain()
    yield drain
    drain.close()
    while OPEN:
        end = OPEN.pop()
        end.sock.close()
        end.peer.close()


def test_who_waits_is_given_what_comes(drain: Drain) -> None:
    one = Bytes(drain)
    threading.Timer(0.05, one.peer.send, args=[b"a"]).start()
    assert drain.wait(lambda: one.got, 5) == [(b"a", "drain")]


def test_what_has_come_before_is_read(drain: Drain) -> None:
    """A connection may hold bytes that its socket does not show any more."""
    one = Bytes(drain)
    one.room = 1
    one.peer.send(b"a")
    assert drain.wait(lambda: one.got, 5)
    reads = 0

    def read_now() -> bool:
        nonlocal reads
        with drain.changed:
            reads += 1
            drain.notify()
        return reads < 3

    one.read_now = read_now  # type: ignore[method-assign]
    started = time.monotonic()
    drain.resume(one)
    assert drain.wait(lambda: reads == 3, 5)
    assert time.monotonic() - started < 0.4  # not by looking again after a while


def test_while_nothing_comes_nothing_is_done(drain: Drain) -> None:
    one = Bytes(drain)
    one.peer.send(b"a")
    assert drain.wait(lambda: one.got, 5)
    started = time.process_time()
    assert not drain.wait(lambda: len(one.got) > 1, 0.5)
    assert time.process_time() - started < 0.1


def test_while_nobody_waits_all_are_read(drain: Drain) -> None:
    ends = [Bytes(drain) for _ in range(3)]
    for end in ends:
        end.peer.send(b"ab")
    deadline = time.monotonic() + 5
    while sum(len(end.got) for end in ends) < 6 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert [end.got for end in ends] == [[(b"a", "drain"), (b"b", "drain")]] * 3


def test_what_is_paused_is_not_read_until_it_is_resumed(drain: Drain) -> None:
    one = Bytes(drain)
    one.room = 1
    one.peer.send(b"ab")
    assert len(drain.wait(lambda: one.got, 5)) == 1
    assert not drain.wait(lambda: len(one.got) > 1, 0.2)
    one.room = 5
    drain.resume(one)
    assert drain.wait(lambda: len(one.got) == 2, 5)


def test_several_threads_wait_and_each_is_woken(drain: Drain) -> None:
    ends = [Bytes(drain) for _ in range(4)]
    woken: list[int] = []

    def wait(index: int) -> None:
        if drain.wait(lambda: ends[index].got, 5):
            woken.append(index)

    threads = [threading.Thread(target=wait, args=[k]) for k in range(4)]
    for thread in threads:
        thread.start()
    for index in (2, 0, 3, 1):
        ends[index].peer.send(b"x")
        threads[index].join(5)
    assert woken == [2, 0, 3, 1]


def test_a_change_by_another_thread_wakes_who_waits(drain: Drain) -> None:
    changed: list[int] = []

    def change() -> None:
        with drain.changed:
            changed.append(1)
            drain.notify()

    threading.Timer(0.05, change).start()
    started = time.monotonic()
    assert drain.wait(lambda: changed, 5) == [1]
    assert time.monotonic() - started < 0.4  # not by looking again after a while


def test_the_end_does_not_wait_for_who_still_waits() -> None:
    drain = Drain()
    waits = threading.Thread(target=drain.wait, args=[lambda: False, 30])
    waits.start()
    closes = threading.Thread(target=drain.close, daemon=True)
    closes.start()
    for thread in (waits, closes):
        thread.join(5)
        assert not thread.is_alive()
