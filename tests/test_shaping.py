"""--link: a slower link, played by the program itself."""

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

import pytest

from sfl.errors import ConfigError, ConnectionLost, SflError
from sfl.transport.connection import Connection
from sfl.transport.listener import listen
from sfl.transport.shaping import Pipe, shaped
from sfl.values import LinkShape
from sfl.wire.messages import Limits, MessageType
from tests.support.dial import dial
from tests.support.launch import Launcher
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

LIMITS = Limits(payload_bytes={MessageType.SEND_MODEL: 10**7})


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", LinkShape()),
        ("100mbit,50ms", LinkShape(12.5e6, 0.05)),
        ("50ms, 2.5gbit", LinkShape(312.5e6, 0.05)),
        ("64kbit", LinkShape(8e3)),
        ("1s,jitter=5ms,loss=0.01", LinkShape(delay_s=1.0, jitter_s=0.005, loss=0.01)),
    ],
)
def test_a_link_is_read(text: str, shape: LinkShape) -> None:
    assert LinkShape.parse(text) == shape
    assert shape.shapes == bool(text)


@pytest.mark.parametrize(
    "text",
    ["fast", "100", "100mb", "0mbit", "5ms,6ms", "loss=1", "loss=5ms", "jitter=3", "-5ms", ","],
)
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--link .* is none of a rate \(100mbit\), a delay"):
        LinkShape.parse(text)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_shaped_link_delays_both_directions_and_carries_every_byte(side: str) -> None:
    shape = LinkShape(bytes_per_s=10e6, delay_s=0.05, jitter_s=0.001)
    data = bytes(range(256)) * 4000  # 0.1 s each way at this rate

    def answer() -> None:
        sock = listener.accept()
        assert sock is not None
        with Connection(sock, timeout_s=5, limits=LIMITS) as one:
            one.send_file(MessageType.SEND_MODEL, one.receive_file(MessageType.SEND_MODEL).payload)
            one.close_gracefully()

    ours, theirs = (shape, LinkShape()) if side == "client" else (LinkShape(), shape)
    with listen("127.0.0.1", 0, theirs) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        connection = dial(f"127.0.0.1:{listener.port}", limits=LIMITS,
            on_wait=print, shape=ours)  # fmt: skip
        with connection:
            started = time.monotonic()
            connection.send_file(MessageType.SEND_MODEL, data)
            assert connection.receive_file(MessageType.SEND_MODEL).payload == data
            assert time.monotonic() - started >= 2 * (0.05 + len(data) / 10e6)
            assert connection.address == f"127.0.0.1:{listener.port}"
        thread.join()
        assert not thread.is_alive()


class OneCut(LinkShape):
    """A link that breaks after one byte."""

    def cut_after(self) -> float:
        return 1.0


class Endless(socket.socket):
    """What may be read for ever, shut down or not, as a TCP socket while its peer sends."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return bytes(size)


def test_a_link_that_has_broken_is_read_no_longer() -> None:
    target, other = socket.socketpair()
    with Endless() as source, target, other:
        pipe = Pipe(source, target, OneCut())
        ended = pipe.ended.wait(5)
        pipe._is_cut = True  # let the thread end, whatever was found
        assert ended


def test_a_link_that_breaks_resets_the_connection() -> None:
    """Whoever waits for a place at a socket that has only said its last may wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        with peer, shaped(listener.accept()[0], OneCut()) as near:
            peer.sendall(b"more than one byte")
            assert near.recv(100) == b"m"
            reset = select.poll()
            reset.register(peer, 0)
            assert reset.poll(5000), "the peer knows at most that nothing more comes"


def test_a_link_that_loses_breaks() -> None:
    """Whoever sends or waits hears that the connection is closed."""

    def take_all() -> None:
        sock = listener.accept()
        assert sock is not None
        with Connection(sock, timeout_s=5, limits=LIMITS) as one, contextlib.suppress(SflError):
            while True:
                one.receive_file(MessageType.SEND_MODEL)

    def send_for_ever(connection: Connection) -> None:
        while True:
            connection.send_file(MessageType.SEND_MODEL, bytes(10**6))

    with listen("127.0.0.1", 0, LinkShape(loss=0.9)) as listener:
        thread = threading.Thread(target=take_all)
        thread.start()
        connection = dial(f"127.0.0.1:{listener.port}", limits=LIMITS,
            on_wait=print)  # fmt: skip
        with connection, pytest.raises(ConnectionLost, match="closed the connection"):
            send_for_ever(connection)
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.slow
def test_a_run_over_a_shaped_link_that_breaks_gives_the_same_weights(
    launcher: Launcher, tmp_path: Path
) -> None:
    """It breaks in seven runs of eight."""
    server = launcher.server("--clients", 2, "--run", "r", "--model", "mlp", "--rounds", 2,
                             "--batch-size", 64, "--keep-tensors", "none")  # fmt: skip
    links = ["200mbit,1ms,jitter=1ms,loss=0.02", "200mbit"]
    clients = [launcher.client("--client-id", k, "--link", link) for k, link in enumerate(links)]
    for program in [server, *clients]:
        program.ended_with(0)
    expected = simulated(tmp_path / "simulated", model="mlp", clients=2)
    assert_equal(weights(tmp_path / "server" / "r"), weights(expected))
