"""What a run needs of a transport: channels to peers, and at a server the set of them.

``sfl.transport`` implements these interfaces; the code of a run uses no sockets.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, Self, TypeVar

from sfl.errors import PeerFailed, SflError
from sfl.values import Position
from sfl.wire.driver import Gate
from sfl.wire.link import Link
from sfl.wire.messages import MessageType

T = TypeVar("T")


class Channel(Link):
    """A link over a transport, with heartbeats. Closed by ``with`` or ``close()``."""

    peer_at = Position()  # the peer's position in the run, by its heartbeats
    bytes_moved = 0  # in both directions, without heartbeats
    # Channels to other peers that are of no use without this one: cut off if its peer is gone, even
    # while nobody reads from it.
    companions: "Sequence[Channel]" = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    @abstractmethod
    def address(self) -> str:
        """The peer's address, for logs."""

    @abstractmethod
    def send_heartbeat(self, silent_s: float) -> None:
        """Send a heartbeat if we have sent nothing for ``silent_s``; called from a thread."""

    def is_cut_off(self) -> bool:
        """Return whether the peer has closed the channel, though its last bytes may be unread."""
        return False

    @abstractmethod
    def cut_off(self) -> None:
        """Let whoever waits for the peer find the connection lost; called from a thread."""

    @abstractmethod
    def last_words(self) -> PeerFailed | None:
        """Return the peer's reason for ending the run, if it has arrived.

        Call it after a failed send: the peer may have sent a reason before it closed.
        """

    @abstractmethod
    def dismiss(self, message_type: MessageType, reason: str) -> None:
        """Send a last message and close, after leaving the peer time to read it."""

    @abstractmethod
    def close_gracefully(self) -> None:
        """Close after our last message, when the peer has had time to read it."""

    @abstractmethod
    def close(self) -> None:
        """Close the channel; threads that wait on it get ``ConnectionLost``."""


class Member(Channel):
    """One of many channels, whose messages are read ahead."""

    num_received = 0  # messages
    is_assigned = False  # whether a conversation receives from it; else see ``ready_members``

    @abstractmethod
    def end_reason(self) -> SflError | None:
        """Return why the channel has ended: the peer's last message, or a failure; None if open."""

    @abstractmethod
    def silent_s(self) -> float:
        """Return how long the peer has been silent; 0 while reading is paused."""

    @abstractmethod
    def age_s(self) -> float:
        """Return the time since the channel was accepted."""


class Members(Protocol):
    """All members of one party, with one call to wait for them."""

    heartbeat_s: float  # interval of heartbeats that registered peers are asked for

    @property
    def members(self) -> Sequence[Member]:
        """The open members."""

    def wait_until(self, ready: Callable[[], T | None], timeout_s: float | None = None) -> T | None:
        """Return ``ready()`` once it is true, or after ``timeout_s``.

        It is called again whenever a member changes, and by ``wake``.
        """

    def wake(self) -> None:
        """Make waiting calls check again; called from other threads."""

    def first_arrived(self, links: Collection[Link]) -> Member | None:
        """Return the one of ``links`` that has failed, or whose message has waited longest."""

    def ready_members(self) -> Sequence[Member]:
        """Return members that have failed, and unassigned ones with a waiting message."""

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        """Wait for ``first_arrived`` or an open gate; return the link, or None.

        Raises:
            ConnectionLost, PeerFailed: a registered member outside ``links`` has ended.
        """

    def drop(
        self, member: Member, reason: str, last_words: MessageType = MessageType.INVALID_MESSAGE
    ) -> None:
        """Refuse one member, and close it after it has had time to read the reason."""

    def log_refusal(self, address: str, reason: str, *, on_console: bool = True) -> None:
        """Report a refused connection on the console and in the log, or in the log alone."""

    def end(self, reason: str, last_words: MessageType = MessageType.ABORT) -> None:
        """Accept no new members; send the reason to all open ones, and close them."""


class Dialler(Protocol):
    """Makes channels to servers."""

    def connect(self, address: str, patience_s: float, *, is_reconnect: bool = False) -> Channel:
        """Connect, retrying for ``patience_s``; ``is_reconnect``: the server was there before.

        Raises:
            ConfigError: the address is malformed.
            RunError: no server answered in time.
            AuthError: the server is not trusted.
            ConnectionLost: the connection was lost at once.
        """
