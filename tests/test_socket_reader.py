"""Reading many connections in one thread, and waiting for what comes."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from sfl.transport.socket_reader import SocketReader

OPEN: list["Bytes"] = []  # that the test is to close


class Bytes:
    """One end of a connection whose bytes are collected."""

    def __init__(self, reader: SocketReader) -> None:
        self.reader = reader
        self.sock, self.peer = socket.socketpair()
        self.sock.setblocking(False)
        self.got: list[tuple[bytes, str]] = []
        self.room = 10
        reader.add(self)
        OPEN.append(self)

    def fileno(self) -> int:
        return self.sock.fileno()

    def read_now(self) -> bool:
        try:
            data = self.sock.recv(1)
        except BlockingIOError:
            return False
        with self.reader.changed:
            self.got.append((data, threading.current_thread().name))
            self.reader.notify()
            self.room -= 1
            if not self.room:
                self.reader.pause(self)
        return bool(self.room)

    def check_silence(self) -> None:
        pass


@pytest.fixture
def reader() -> Iterator[SocketReader]:
    reader = SocketReader()
    yield reader
    reader.close()
    while OPEN:
        end = OPEN.pop()
        end.sock.close()
        end.peer.close()


def test_who_waits_is_given_what_comes(reader: SocketReader) -> None:
    one = Bytes(reader)
    threading.Timer(0.05, one.peer.send, args=[b"a"]).start()
    assert reader.wait(lambda: one.got, 5) == [(b"a", "reader")]


def test_what_has_come_before_is_read(reader: SocketReader) -> None:
    """A connection may hold bytes that its socket does not show any more."""
    one = Bytes(reader)
    one.room = 1
    one.peer.send(b"a")
    assert reader.wait(lambda: one.got, 5)
    reads = 0

    def read_now() -> bool:
        nonlocal reads
        with reader.changed:
            reads += 1
            reader.notify()
        return reads < 3

    one.read_now = read_now  # type: ignore[method-assign]
    started = time.monotonic()
    reader.resume(one)
    assert reader.wait(lambda: reads == 3, 5)
    assert time.monotonic() - started < 0.4  # not by looking again after a while


def test_while_nothing_comes_nothing_is_done(reader: SocketReader) -> None:
    one = Bytes(reader)
    one.peer.send(b"a")
    assert reader.wait(lambda: one.got, 5)
    started = time.process_time()
    assert not reader.wait(lambda: len(one.got) > 1, 0.5)
    assert time.process_time() - started < 0.1


def test_while_nobody_waits_all_are_read(reader: SocketReader) -> None:
    ends = [Bytes(reader) for _ in range(3)]
    for end in ends:
        end.peer.send(b"ab")
    deadline = time.monotonic() + 5
    while sum(len(end.got) for end in ends) < 6 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert [end.got for end in ends] == [[(b"a", "reader"), (b"b", "reader")]] * 3


def test_what_is_paused_is_not_read_until_it_is_resumed(reader: SocketReader) -> None:
    one = Bytes(reader)
    one.room = 1
    one.peer.send(b"ab")
    assert len(reader.wait(lambda: one.got, 5)) == 1
    assert not reader.wait(lambda: len(one.got) > 1, 0.2)
    one.room = 5
    reader.resume(one)
    assert reader.wait(lambda: len(one.got) == 2, 5)


def test_several_threads_wait_and_each_is_woken(reader: SocketReader) -> None:
    ends = [Bytes(reader) for _ in range(4)]
    woken: list[int] = []

    def wait(index: int) -> None:
        if reader.wait(lambda: ends[index].got, 5):
            woken.append(index)

    threads = [threading.Thread(target=wait, args=[k]) for k in range(4)]
    for thread in threads:
        thread.start()
    for index in (2, 0, 3, 1):
        ends[index].peer.send(b"x")
        threads[index].join(5)
    assert woken == [2, 0, 3, 1]


def test_a_change_by_another_thread_wakes_who_waits(reader: SocketReader) -> None:
    changed: list[int] = []

    def change() -> None:
        with reader.changed:
            changed.append(1)
            reader.notify()

    threading.Timer(0.05, change).start()
    started = time.monotonic()
    assert reader.wait(lambda: changed, 5) == [1]
    assert time.monotonic() - started < 0.4  # not by looking again after a while


def test_the_end_does_not_wait_for_who_still_waits() -> None:
    reader = SocketReader()
    waits = threading.Thread(target=reader.wait, args=[lambda: False, 30])
    waits.start()
    closes = threading.Thread(target=reader.close, daemon=True)
    closes.start()
    for thread in (waits, closes):
        thread.join(5)
        assert not thread.is_alive()
