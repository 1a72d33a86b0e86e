"""What every transport promises: clauses of two sides each, who talk over one connection.

Within a process: ``serve`` and ``call`` on two threads. As processes: ``python -m
tests.support.contract mpi`` under mpirun, or ``... rpc server HOST:PORT`` and ``... rpc client
HOST:PORT``; exit code 0 means that all clauses hold.
"""

import contextlib
import sys
import time
from collections.abc import Callable

import pytest

from sfl.errors import ConnectionLost, PeerFailed, ProtocolError
from sfl.nodes import ClientNode, ServerNode
from sfl.transport.guard import Terms, guard_of
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import SERVER
from sfl.transport.transports import TRANSPORTS, ServerNetwork, transport_to
from sfl.wire.link import Link
from sfl.wire.members import Channel, Dialler
from sfl.wire.messages import Limits, MessageType

LARGE = 64 * 2**20  # bytes
TIMEOUT_S = 8.0
LINK = "10gbit,1ms"  # of the processes, which have no sockets to shape
LIMITS = Limits(json_bytes=100_000, payload_bytes={MessageType.SEND_MODEL: LARGE})
Side = Callable[[Channel], None]


def _say(link: Link, content: object) -> None:
    link.send_message_as_json(MessageType.REGISTERED, content=content)


def _hear(link: Link) -> object:
    return link.receive_message_as_json(MessageType.REGISTERED).content


def _content(size: int, seed: int) -> bytes:
    block = bytes((seed + k * k) % 256 for k in range(4096))
    return (block * (size // 4096 + 1))[:size]


SIZES = [1, 125, 126, 127, 65_535, 65_536, 65_537, 262_144, 262_145, 1_048_577]


def echoes(link: Channel) -> None:
    for number, size in enumerate(SIZES * 3):
        file = link.receive_file(MessageType.SEND_MODEL)
        assert bytes(file.payload) == _content(size, number)
        link.send_file(MessageType.SEND_MODEL, bytes(file.payload))
        _say(link, number)
    link.receive_message_as_json(MessageType.UNREGISTER)


def sends_in_order(link: Channel) -> None:
    """Each file is sent before the last one has come back."""
    sent = [_content(size, number) for number, size in enumerate(SIZES * 3)]
    for number in range(len(sent) + 1):
        if number < len(sent):
            link.send_file(MessageType.SEND_MODEL, sent[number])
        if number:
            file = link.receive_file(MessageType.SEND_MODEL)
            assert bytes(file.payload) == sent[number - 1]
            assert _hear(link) == number - 1
    link.send_message_as_json(MessageType.UNREGISTER)


def gives_a_large_file_back(link: Channel) -> None:
    before = link.counters.copy()
    file = link.receive_file(MessageType.SEND_MODEL)
    link.send_file(MessageType.SEND_MODEL, bytes(file.payload))
    now = link.counters
    _say(link, [now.bytes_received - before.bytes_received, now.bytes_sent - before.bytes_sent])
    link.receive_message_as_json(MessageType.UNREGISTER)


def counts_a_large_file(link: Channel) -> None:
    before, data = link.counters.copy(), _content(LARGE, 7)
    link.send_file(MessageType.SEND_MODEL, data)
    assert bytes(link.receive_file(MessageType.SEND_MODEL).payload) == data
    now = link.counters
    counted = [now.bytes_sent - before.bytes_sent, now.bytes_received - before.bytes_received]
    assert _hear(link) == counted
    link.send_message_as_json(MessageType.UNREGISTER)
    assert LARGE < counted[0] < LARGE + 1000  # what a frame adds


def refuses_what_is_too_large(link: Channel) -> None:
    with pytest.raises(ProtocolError, match="at most") as caught:
        link.receive_file(MessageType.SEND_MODEL)
    link.dismiss(MessageType.INVALID_MESSAGE, str(caught.value))


def is_refused(link: Channel) -> None:
    with contextlib.suppress(PeerFailed, ConnectionLost):  # told before all of it is sent
        link.send_file(MessageType.SEND_MODEL, bytes(LARGE + 1))
    why = link.last_words()
    assert why is not None
    assert "at most" in str(why)


def notices_silence(link: Channel) -> None:
    began_at = time.monotonic()
    with pytest.raises(ConnectionLost, match=f"sent nothing for {TIMEOUT_S:g} seconds"):
        _hear(link)
    assert time.monotonic() - began_at < 2 * TIMEOUT_S
    link.dismiss(MessageType.ABORT, "you are silent")


def is_silent(link: Channel) -> None:
    time.sleep(TIMEOUT_S + 1)
    with pytest.raises(PeerFailed, match="you are silent"):
        _hear(link)


def notices_the_end(link: Channel) -> None:
    began_at = time.monotonic()
    with pytest.raises(ConnectionLost, match="closed the connection"):
        _hear(link)
    assert time.monotonic() - began_at < TIMEOUT_S / 2


def closes(link: Channel) -> None:
    link.close_gracefully()


CLAUSES: dict[str, tuple[Side, Side]] = {  # server's side, client's
    "order": (echoes, sends_in_order),
    "large file": (gives_a_large_file_back, counts_a_large_file),
    "limits": (refuses_what_is_too_large, is_refused),
    "deadline": (notices_silence, is_silent),
    "end": (notices_the_end, closes),
}


def serve(network: ServerNetwork) -> None:
    """Be the server of each clause, in whatever order they are called."""
    for _ in CLAUSES:
        found = network.wait_until(network.ready_members, 60)
        assert found, "no client has come"
        (link,) = found
        name = link.receive_message_as_json(MessageType.REGISTER).content
        link.limits, link.peer_name = LIMITS, f"client {name}"
        _say(link, "begin")  # a file that comes before the limits are set is refused
        CLAUSES[name][0](link)
        network.drop(link, "over")


def call(dialler: Dialler, address: str) -> None:
    """Be the client of each clause."""
    for name, (_, side) in CLAUSES.items():
        with dialler.connect(address, 30) as link:
            link.limits, link.peer_name = LIMITS, "server"
            link.send_message_as_json(MessageType.REGISTER, content=name)
            assert _hear(link) == "begin"
            side(link)


def serve_over(node: ServerNode, then: Callable[[str], None] = print) -> None:
    """Listen, say where to ``then``, and be the server."""
    row, terms = TRANSPORTS[node.transport], Terms(TIMEOUT_S)
    with row.listen(node, 1) as listener:
        then(listener.address)
        with row.serve(listener, terms, guard_of(node, SERVER), RefusalLog(print)) as network:
            serve(network)


def call_over(node: ClientNode) -> None:
    with transport_to(node.server).client(node, print) as dialler:
        call(dialler, node.server)


def main(transport: str, side: str = "", address: str = "") -> None:
    if transport == "mpi":
        from sfl.transport.mpi import world

        side = "client" if world().rank else "server"
    if side == "server":
        host, _, port = address.partition(":")
        own = {"host": host, "port": int(port)} if address else {}
        serve_over(ServerNode(transport=transport, peer_timeout=TIMEOUT_S, link=LINK, **own))
    else:
        where = f"rpc://{address}/1/2" if address else "mpi://"
        call_over(ClientNode(server=where, peer_timeout=TIMEOUT_S, link=LINK))
    sys.stdout.write(f"{side}: {len(CLAUSES)} clauses hold\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
