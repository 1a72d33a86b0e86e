"""The table of transports: each opens a server's network and connects to it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sfl.nodes import PeerNode, ServerNode
from sfl.transport.addresses import format_address, parse_url
from sfl.transport.guard import Guard, Terms
from sfl.transport.listener import listen
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tcp_client import TcpClient, TcpClients, dialling_of
from sfl.transport.tcp_server import TcpServer
from sfl.transport.tunnel import TunnelListener
from sfl.wire.driver import Network
from sfl.wire.members import Dialler, Members
from sfl.wire.messages import MessageType

Say = Callable[[str], None]


class Listening(Protocol):
    """A listening endpoint; a server's network is opened on it."""

    @property
    def address(self) -> str: ...


class ServerNetwork(Members, Network, Protocol):
    """The members of a server; usable as a ``Network`` where clients cannot reconnect."""


class ClientNetwork(Dialler, Network, Protocol):
    """The connections of many clients in one process."""

    def end(self, reason: str, last_words: MessageType) -> None: ...


@dataclass(frozen=True)
class Transport:
    """How to open both ends of connections."""

    listen: Callable[[ServerNode, int], AbstractContextManager[Any]]  # for so many clients
    serve: Callable[[Any, Terms, Guard, RefusalLog], AbstractContextManager[ServerNetwork]]
    client: Callable[[PeerNode, Say], AbstractContextManager[Dialler]]
    clients: Callable[[PeerNode, Say], AbstractContextManager[ClientNetwork]]


TCP = Transport(
    lambda node, clients: listen(node.host, node.port, node.link_shape),
    TcpServer,
    lambda node, say: TcpClient(dialling_of(node, say)),
    lambda node, say: TcpClients(dialling_of(node, say)),
)
WS = replace(TCP, serve=lambda listener, terms, guard, refusals: TcpServer(
    listener, terms, replace(guard, websocket=True), refusals
))  # fmt: skip


def _listen_mpi(node: ServerNode, clients: int) -> TunnelListener:
    from sfl.transport.mpi import world  # importing it starts MPI

    return world().listen(node.link_shape)


def _listen_rpc(node: ServerNode, clients: int) -> TunnelListener:
    from sfl.transport.rpc import joined

    where = format_address(node.host, node.port)
    return joined().listen(node.link_shape, clients + 1, where)


MPI, RPC = (replace(TCP, listen=listen) for listen in (_listen_mpi, _listen_rpc))
TRANSPORTS = {"tcp": TCP, "ws": WS, "mpi": MPI, "rpc": RPC}


def transport_to(address: str) -> Transport:
    """Return the transport that reaches a server, by its address.

    Raises:
        ConfigError: the address is malformed.
    """
    return TRANSPORTS[parse_url(address).transport.replace("wss", "ws")]
