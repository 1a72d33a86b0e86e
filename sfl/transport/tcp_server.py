"""A server's TCP connections: ``acceptor`` admits them, ``buffered`` reads them ahead."""

from collections.abc import Collection

from sfl.errors import SflError
from sfl.transport.acceptor import Acceptor
from sfl.transport.guard import Guard, Terms
from sfl.transport.heartbeat import interval_s
from sfl.transport.listener import Listener
from sfl.transport.pending import PendingConnection
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tcp_network import TcpNetwork
from sfl.wire.driver import Gate
from sfl.wire.link import Link


class TcpServer(TcpNetwork):
    """A listening socket and the connections that it accepted."""

    def __init__(
        self,
        listener: Listener,
        terms: Terms,
        guard: Guard | None = None,
        refusals: RefusalLog | None = None,
    ) -> None:
        """``guard`` decides who is admitted; ``refusals`` logs who is not."""
        super().__init__(terms.timeout_s, terms.limits)
        self.heartbeat_s = terms.heartbeat_s or interval_s(terms.timeout_s)
        self._max_unregistered = terms.max_unregistered
        self._refusals = refusals or RefusalLog()
        self._acceptor = Acceptor(listener, guard or Guard(), self._admit, self._refusals)

    def _admit(self, pending: PendingConnection) -> None:
        with self._lock:
            strangers = [c for c in self._connections if not c.peer_name]
            if len(strangers) + self._num_leaving >= self._max_unregistered:
                pending.stream.close()
                return
        self.add(pending.stream, pending)

    def wait(self, links: Collection[Link], gates: Collection[Gate] = ()) -> Link | None:
        def ended() -> SflError | None:
            others = (c for c in self.ready_members() if c.peer_name and c not in links)
            return next(filter(None, (other.end_reason() for other in others)), None)

        self._reader.wait(lambda: self.first_arrived(links) or ended() or any(g() for g in gates))
        if why := ended():
            raise why
        return self.first_arrived(links)

    def log_refusal(self, address: str, reason: str, *, on_console: bool = True) -> None:
        self._refusals.add(address, reason, on_console=on_console)

    def _stop_adding(self) -> None:
        self._acceptor.close()
