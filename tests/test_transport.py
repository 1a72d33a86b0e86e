"""Connections over real sockets: the four calls, deadlines, ends in mid-message, counters."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sfl.errors import ConfigError, ConnectionLost, PeerFailed, ProtocolError, RunError
from sfl.transport.addresses import parse_address
from sfl.transport.buffered import READ_AHEAD_MESSAGES, BufferedConnection
from sfl.transport.connection import Connection
from sfl.transport.guard import Terms
from sfl.transport.listener import listen
from sfl.transport.tcp_server import TcpServer
from sfl.values import Position
from sfl.wire.framing import HEAD, encode_head
from sfl.wire.link import one_line
from sfl.wire.messages import Limits, Message, MessageType
from tests.support.dial import dial

LIMITS = Limits(payload_bytes={MessageType.SEND_MODEL: 50_000_000})
AT = Position("run", 3, 4, 1, 0)


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = socket.socketpair()
    with (
        Connection(ours, timeout_s=5, limits=LIMITS) as one,
        Connection(theirs, timeout_s=5, limits=LIMITS) as other,
    ):
        yield one, other


def test_taking_leave_of_a_peer_that_stays_takes_no_longer_than_a_farewell(
    pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.transport.connection.FAREWELL_S", 0.05)
    began_at = time.monotonic()
    pair[0].close_gracefully()
    assert time.monotonic() - began_at < 4  # seconds; a peer that is silent is waited for for five


def test_messages_and_files_arrive_as_they_were_sent(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    one.send_message_as_json(MessageType.REGISTER, "a", "b", {"x": [1.5, None]}, at=AT)
    one.send_file(MessageType.SEND_MODEL, b"bytes of a file", "a", "b", at=AT)
    message = other.receive_message_as_json(MessageType.REGISTER)
    assert message == Message(MessageType.REGISTER, "a", "b", {"x": [1.5, None]}, AT)
    file = other.receive_file(MessageType.SEND_MODEL, at=AT)
    assert bytes(file.payload) == b"bytes of a file"


def test_a_file_larger_than_the_sockets_buffers_arrives_and_all_bytes_are_counted(
    pair: tuple[Connection, Connection],
) -> None:
    one, other = pair
    data = bytes(range(256)) * 100_000
    thread = threading.Thread(target=one.send_file, args=(MessageType.SEND_MODEL, data))
    thread.start()
    assert other.receive_file(MessageType.SEND_MODEL).payload == data
    thread.join()
    expected = len(encode_head(Message(MessageType.SEND_MODEL, payload=data))) + len(data)
    assert one.counters.bytes_sent == other.counters.bytes_received == expected
    assert one.counters.messages_sent == other.counters.messages_received == 1
    assert one.counters.bytes_received == other.counters.bytes_sent == 0


def test_what_is_not_expected_is_named(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    one.send_message_as_json(MessageType.UNREGISTER)
    with pytest.raises(ProtocolError, match="sent UNREGISTER, expected was REGISTER or SEND_FILE"):
        other.receive_message_as_json(MessageType.REGISTER, MessageType.SEND_FILE)
    one.send_message_as_json(MessageType.REGISTER, at=AT)
    with pytest.raises(ProtocolError, match=r"step=4.*expected was .*step=5"):
        other.receive_message_as_json(MessageType.REGISTER, at=Position("run", 3, 5, 1, 0))


def test_notices_are_passed_on_and_last_words_raised(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    notices: list[str] = []
    other.on_notice, other.peer_name = notices.append, "server"
    one.send_message_as_json(MessageType.MESSAGE, content="wait\x1b[2J")
    one.send_message_as_json(MessageType.ABORT, content="disk\nfull\x1b[2J")
    with pytest.raises(PeerFailed, match=r"the server stopped: disk full \[2J"):
        other.receive_message_as_json(MessageType.START_TRAINING)
    assert notices == ["wait [2J"]


FRAME = encode_head(Message(MessageType.SEND_MODEL, payload=b"p" * 100)) + b"p" * 100
JSON_END = len(FRAME) - 100


@pytest.mark.parametrize(
    ("sent", "inside"),
    [(0, ""), (1, "head"), (HEAD.size - 1, "head"), (HEAD.size, "JSON"), (HEAD.size + 5, "JSON"),
     (JSON_END, "payload"), (len(FRAME) - 1, "payload")],
)  # fmt: skip
def test_a_connection_closed_in_mid_message_is_lost_at_once(sent: int, inside: str) -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours, timeout_s=60, limits=LIMITS) as one:
        theirs.sendall(FRAME[:sent])
        theirs.close()
        started = time.monotonic()
        where = f"closed the connection in the middle of a message's {inside}$" if inside else "n$"
        with pytest.raises(ConnectionLost, match=where):
            one.receive_file(MessageType.SEND_MODEL)
        assert time.monotonic() - started < 5


def test_deadlines_hold_for_receiving_and_sending() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours, timeout_s=0.05, limits=LIMITS) as one, theirs:
        with pytest.raises(ConnectionLost, match=r"sent nothing for 0.05 seconds$"):
            one.receive_message_as_json(MessageType.REGISTER)
        theirs.sendall(FRAME[:30])
        with pytest.raises(ConnectionLost, match="seconds in the middle of a message's JSON"):
            one.receive_message_as_json(MessageType.REGISTER)
        with pytest.raises(ConnectionLost, match="took nothing"):
            one.send_file(MessageType.SEND_MODEL, bytes(10_000_000))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "::"])
def test_listen_and_connect_over_ipv4_and_ipv6(host: str) -> None:
    with listen(host, 0) as listener:
        port = listener.port
        targets = {"::": ["127.0.0.1", "::1"]}.get(host, [host])
        for target in targets:
            waits: list[str] = []
            with dial(f"[{target}]:{port}", limits=LIMITS, on_wait=waits.append) as one:
                sock = listener.accept()
                with Connection(sock, timeout_s=5, limits=LIMITS) as other:
                    one.send_message_as_json(MessageType.REGISTER)
                    assert other.receive_message_as_json(MessageType.REGISTER)
                    nodelay = one._stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    assert nodelay
            assert waits == []


def test_connect_waits_for_a_server_that_is_not_up_yet() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.port
    waiting = threading.Event()
    connected: list[str] = []

    def run() -> None:
        with dial(f"127.0.0.1:{port}", patience_s=30, limits=LIMITS,
            on_wait=lambda line: waiting.set()) as connection:  # fmt: skip
            connected.append(connection.address)

    thread = threading.Thread(target=run)
    thread.start()
    assert waiting.wait(10)
    with listen("127.0.0.1", port) as listener:
        listener.accept().close()
        thread.join()
    assert connected == [f"127.0.0.1:{port}"]


def test_connect_gives_up_after_its_deadline() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.port
    with pytest.raises(RunError, match=r"no server at 127.0.0.1:\d+ within 0.3 seconds"):
        dial(f"127.0.0.1:{port}", patience_s=0.3, limits=LIMITS)


def test_a_port_in_use_and_a_foreign_address_are_said() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.port
        with pytest.raises(
            RunError, match=f"cannot listen on 127.0.0.1:{port}: Address already in"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(RunError, match=r"cannot listen on 192\.0\.2\.1:0"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    "text", ["", "host:", ":80", "[::1", "a b", "::1", "host:x", "host:0", "::1:80", "h:99999"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


def test_addresses_are_parsed() -> None:
    assert parse_address("host.example:80") == ("host.example", 80)
    assert parse_address("[fe80::1]:80") == ("fe80::1", 80)
    assert parse_address("10.0.0.2") == ("10.0.0.2", 8765)
    assert parse_address("[::1]") == ("::1", 8765)


def test_a_peers_text_becomes_one_bounded_line() -> None:
    assert one_line("a\nb\x00c" + "d" * 1000) == "a b c" + "d" * 495


def network() -> tuple[TcpServer, int]:
    listener = listen("127.0.0.1", 0)
    return TcpServer(listener, Terms(5, LIMITS)), listener.port


def dialled(port: int) -> Connection:
    return dial(f"127.0.0.1:{port}", limits=LIMITS)


def test_the_network_gives_the_message_that_has_waited_longest() -> None:
    board, port = network()
    with board, dialled(port) as one, dialled(port) as other:
        for connection, name in ((one, "one"), (other, "other"), (one, "again")):
            connection.send_message_as_json(MessageType.REGISTER, content=name)
            while sum(len(c._inbox) for c in board.members) < {"one": 1, "other": 2}.get(name, 3):
                board.wait_until(board.ready_members, 0.01)
        got = []
        for _ in range(3):
            link = board.wait(board.members)
            got.append(link.receive_message_as_json(MessageType.REGISTER).content)
        assert got == ["one", "other", "again"]


def test_a_connection_whose_messages_nobody_takes_is_no_longer_read() -> None:
    board, port = network()
    with board, dialled(port) as one:
        data = bytes(1_000_000)
        connection = register(board, one)
        sent = threading.Thread(
            target=lambda: [one.send_file(MessageType.SEND_MODEL, data) for _ in range(40)]
        )
        sent.start()
        sent.join(1.0)  # time enough for 40 MB, if somebody read them
        assert sent.is_alive()
        assert len(connection._inbox) == READ_AHEAD_MESSAGES
        for _ in range(40):
            connection.receive_file(MessageType.SEND_MODEL)
        sent.join()


def register(board: TcpServer, connection: Connection) -> BufferedConnection:
    """Send REGISTER over a connection; return the board's end of it."""
    connection.send_message_as_json(MessageType.REGISTER)
    (link,) = board.wait_until(board.ready_members, 5)
    link.receive_message_as_json(MessageType.REGISTER)
    return link


def test_a_client_that_does_not_read_holds_up_nobody() -> None:
    board, port = network()
    with board, dialled(port) as slow, dialled(port) as quick:
        by_name = {"slow": register(board, slow), "quick": register(board, quick)}
        data = bytes(range(256)) * 160_000  # far beyond the sockets' buffers
        started = time.monotonic()
        for _ in range(3):
            by_name["slow"].send_file(MessageType.SEND_MODEL, data)
        by_name["slow"].send_message_as_json(MessageType.TRAINING_DONE)
        by_name["quick"].send_message_as_json(MessageType.TRAINING_DONE)
        quick.receive_message_as_json(MessageType.TRAINING_DONE)
        assert time.monotonic() - started < 4  # its deadline is 5 seconds
        for _ in range(3):
            assert slow.receive_file(MessageType.SEND_MODEL).payload == data
        slow.receive_message_as_json(MessageType.TRAINING_DONE)
        sent = by_name["slow"].counters
        assert (sent.bytes_sent, sent.messages_sent) == (slow.counters.bytes_received, 4)


def test_no_reason_is_waited_for_where_nobody_reads() -> None:
    """A peer fills its inbox, and is gone before it is answered."""
    board, port = network()
    with board, dialled(port) as one:
        link = register(board, one)
        for _ in range(20):
            one.send_message_as_json(MessageType.REGISTER)
        while len(link._inbox) < READ_AHEAD_MESSAGES:
            board.wait_until(lambda: None, 0.01)
        sock = one._stream.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()  # which resets the connection
        began_at = time.monotonic()
        while not link.is_closed:
            try:
                link.send_message_as_json(MessageType.REGISTERED)
            except ConnectionLost:
                break
        assert time.monotonic() - began_at < 1


def test_a_client_that_never_reads_is_given_up() -> None:
    with listen("127.0.0.1", 0) as listener:
        board = TcpServer(listener, Terms(0.5, LIMITS))
        with board, dialled(listener.port) as slow:
            link = register(board, slow)
            link.send_file(MessageType.SEND_MODEL, bytes(40_000_000))
            with pytest.raises(ConnectionLost, match=r"(took|sent) nothing for 0.5 seconds"):
                board.wait([link]).receive_message_as_json(MessageType.UNREGISTER)


def test_the_reason_comes_behind_the_file_that_is_on_its_way() -> None:
    board, port = network()
    with board, dialled(port) as one:
        one.peer_name = "server"
        link = register(board, one)
        data = bytes(range(256)) * 80_000  # far beyond the sockets' buffers
        link.send_file(MessageType.SEND_MODEL, data)
        one._stream.send([memoryview(b"x" * 100)])  # is no message
        while not link.end_reason():
            board.wait_until(board.ready_members, 0.01)
        last = MessageType.INVALID_MESSAGE
        ending = threading.Thread(target=link.end_sending, args=(last, "the reason why"))
        ending.start()
        assert one.receive_file(MessageType.SEND_MODEL).payload == data
        with pytest.raises(PeerFailed, match="the server refused: the reason why"):
            one.receive_message_as_json(MessageType.REGISTERED)
        ending.join()


def test_a_message_that_comes_before_its_connection_is_listed_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = BufferedConnection.__init__

    def start_and_wait_for_the_message(
        connection: BufferedConnection, *args: Any, **kw: Any
    ) -> None:
        start(connection, *args, **kw)
        with connection._changed:
            assert connection._changed.wait_for(lambda: connection.arrived, 5)

    monkeypatch.setattr(BufferedConnection, "__init__", start_and_wait_for_the_message)
    board, port = network()
    with board, dialled(port) as one:
        waiting: list[float] = []

        def wait() -> None:
            started = time.monotonic()
            assert board.wait_until(board.ready_members, 5)
            waiting.append(time.monotonic() - started)

        thread = threading.Thread(target=wait)
        thread.start()
        one.send_message_as_json(MessageType.REGISTER)
        thread.join()
        assert waiting[0] < 4


def test_only_so_many_may_connect_without_registering() -> None:
    with listen("127.0.0.1", 0) as listener:
        board = TcpServer(listener, Terms(5, LIMITS, max_unregistered=2))
        with board, dialled(listener.port) as first, dialled(listener.port) as second:
            for connection in (first, second):
                register(board, connection)
            with dialled(listener.port) as third:
                third.send_message_as_json(MessageType.REGISTER)
                with pytest.raises(ConnectionLost, match="closed the connection"):
                    third.receive_message_as_json(MessageType.REGISTERED)


@pytest.mark.slow
def test_the_end_reaches_a_peer_that_is_sending() -> None:
    board, port = network()
    with dialled(port) as one:
        one.peer_name = "server"
        one.send_message_as_json(MessageType.REGISTER)
        assert board.wait_until(board.ready_members, 5)
        ended = threading.Thread(target=board.end, args=("client_1 was lost",))
        ended.start()

        def send_for_ever() -> None:
            while True:
                one.send_file(MessageType.SEND_MODEL, bytes(100_000))

        with pytest.raises(ConnectionLost):
            send_for_ever()
        assert str(one.last_words()) == "the server stopped: client_1 was lost"
        one.close()
        ended.join()


def test_a_port_can_be_taken_again_at_once() -> None:
    board, port = network()
    with board, dialled(port) as one:
        one.send_message_as_json(MessageType.REGISTER)
        assert board.wait_until(board.ready_members, 5)
    listen("127.0.0.1", port).close()
