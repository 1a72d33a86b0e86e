"""The table of transports: each opens a server's network and connects to it."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sfl.errors import ConfigError, command
from sfl.nodes import PeerNode, ServerNode
from sfl.registry import named
from sfl.transport.addresses import format_address, is_loopback, parse_url
from sfl.transport.guard import Guard, Terms, exposure
from sfl.transport.listener import Listener, listen
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tcp_client import Outgoing, TcpClient, TcpClients, dialling_of
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
    # Makes connections of a hop to the next party, which are read along with those it accepts.
    dial: Callable[[Any, PeerNode, Say], Dialler]
    check: Callable[[ServerNode], None] = lambda node: None  # raises ConfigError
    # What a server says at its start: who can reach it, and what this transport cannot do.
    notes: Callable[[ServerNode], list[str]] = exposure
    may_return: bool = True  # whether a client whose connection is lost can come back


TCP = Transport(
    lambda node, clients: listen(node.host, node.port, node.link_shape),
    TcpServer,
    lambda node, say: TcpClient(dialling_of(node, say)),
    lambda node, say: TcpClients(dialling_of(node, say)),
    lambda network, node, say: Outgoing(network, dialling_of(node, say)),
)


def _serve_ws(listener: Listener, terms: Terms, guard: Guard, refusals: RefusalLog) -> TcpServer:
    guard.websocket = True  # the same guard: a fed server names its run in it later
    return TcpServer(listener, terms, guard, refusals)


def _check_ws(node: ServerNode) -> None:
    import sfl.transport.websocket  # noqa: F401 - who lacks its library is told at the start


WS = replace(TCP, check=_check_ws, serve=_serve_ws)


# What has no use among processes that start together and trust each other.
_NOT_FIXED = ("token_file", "tls_cert", "tls_key", "tls_client_ca", "serve", "role", "on_missing")


def _check_fixed(node: ServerNode) -> None:
    if given := node.given(_NOT_FIXED):
        raise ConfigError(
            f"--transport {node.transport}: leave out {', '.join(given)}: its processes start"
            " together, trust each other, and none of them can come back"
        )


def _check_mpi(node: ServerNode) -> None:
    from sfl.transport.mpi import world  # importing it starts MPI

    _check_fixed(node)
    if world().size == 1:
        raise ConfigError(
            "--transport mpi: start the server and all clients together: mpirun -n 4 python -m"
            f" mpi4py {command('mpi')}"
        )
    if not (world().is_one_machine or node.insecure):
        raise ConfigError(
            "--transport mpi: whoever reaches MPI's ports can take part: give --insecure if only"
            " trusted peers reach these machines"
        )


def _listen_mpi(node: ServerNode, clients: int) -> TunnelListener:
    from sfl.transport.mpi import world

    return world().listen(node.link_shape)


def _check_rpc(node: ServerNode) -> None:
    _check_fixed(node)
    if not (is_loopback(node.host) or node.insecure):
        raise ConfigError(
            f"--host {node.host}: torch.distributed.rpc runs what its peers send: give --insecure"
            " if only trusted peers reach this machine, or take --transport tcp"
        )


def _listen_rpc(node: ServerNode, clients: int) -> TunnelListener:
    from sfl.transport.rpc import joined

    where = format_address(node.host, node.port)
    sys.stdout.write(f"waiting until all {clients} clients have joined at {where}\n")
    sys.stdout.flush()
    return joined().listen(node.link_shape, clients + 1, where)


def _fixed_notes(node: ServerNode) -> list[str]:
    trusted = ["warning: --insecure: whoever reaches these machines' ports can run code on them"]
    return [
        f"over {node.transport} no process can come back: if one is lost, start all again with"
        " --resume",
        *trusted * node.insecure,
    ]


def _one_a_process(node: PeerNode, say: Say) -> AbstractContextManager[ClientNetwork]:
    raise ConfigError("over rpc each client is a process of its own: give --client-id, not -ids")


_FIXED = replace(TCP, notes=_fixed_notes, may_return=False)
MPI = replace(_FIXED, listen=_listen_mpi, check=_check_mpi)
RPC = replace(_FIXED, listen=_listen_rpc, check=_check_rpc, clients=_one_a_process)
TRANSPORTS = {"tcp": TCP, "ws": WS, "mpi": MPI, "rpc": RPC}


def transport_of(node: ServerNode) -> Transport:
    """Return the transport of a server.

    Raises:
        ConfigError: there is no such transport, or it does not go with the node's other options.
    """
    row = named("--transport", node.transport, TRANSPORTS)
    row.check(node)
    return row


def transport_to(address: str) -> Transport:
    """Return the transport that reaches a server, by its address.

    Raises:
        ConfigError: the address is malformed.
    """
    return TRANSPORTS[parse_url(address).transport.replace("wss", "ws")]
