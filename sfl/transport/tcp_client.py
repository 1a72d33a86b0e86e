"""Outgoing TCP connections: read by the calling thread, or many read by a background thread."""

from collections.abc import Callable
from typing import Self

from sfl.nodes import PeerNode
from sfl.transport.buffered import BufferedConnection
from sfl.transport.certificates import client_tls
from sfl.transport.connecting import Dialling, open_stream
from sfl.transport.connection import Connection
from sfl.transport.heartbeat import Heartbeat
from sfl.transport.tcp_network import TcpNetwork
from sfl.wire.messages import MessageType


def dialling_of(node: PeerNode, say: Callable[[str], None]) -> Dialling:
    """Return how a machine connects, by its options.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    return Dialling(node.peer_timeout, client_tls(node), node.link_shape, say)


class TcpClient:
    """Makes connections that the receiving thread reads itself. Closed by ``with``."""

    def __init__(self, dialling: Dialling) -> None:
        self._dialling = dialling
        self._connections: list[Connection] = []
        self._heartbeat = Heartbeat(lambda: self._connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._heartbeat.stop()

    def connect(self, address: str, patience_s: float, *, is_reconnect: bool = False) -> Connection:
        """Do as ``open_stream``."""
        stream = open_stream(address, self._dialling, patience_s, is_reconnect=is_reconnect)
        timeout_s = self._dialling.timeout_s
        connection = Connection(stream, timeout_s=timeout_s, limits=self._dialling.limits)
        self._connections = [c for c in self._connections if not c.is_closed] + [connection]
        return connection


class Outgoing:
    """Makes connections that the thread of a network reads."""

    def __init__(self, network: TcpNetwork, dialling: Dialling) -> None:
        self._network, self._dialling = network, dialling

    def connect(
        self, address: str, patience_s: float, *, is_reconnect: bool = False
    ) -> BufferedConnection:
        """Do as ``open_stream``; safe to call from several threads."""
        stream = open_stream(address, self._dialling, patience_s, is_reconnect=is_reconnect)
        return self._network.add(stream)


class TcpClients(TcpNetwork):
    """Makes connections that a background thread reads, for many clients in one process."""

    farewell = "interrupted", MessageType.UNREGISTER

    def __init__(self, dialling: Dialling) -> None:
        super().__init__(dialling.timeout_s, dialling.limits)
        self.connect = Outgoing(self, dialling).connect
