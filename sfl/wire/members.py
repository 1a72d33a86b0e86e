"""What a run needs of a transport: channels to peers, and at a server one place for them all.

The classes of ``sfl.transport`` are such; a run is given them and knows no socket.
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
    """A link over a transport: it shows signs of life, and closes with a last word.

    Closed by ``with`` or ``close()``.
    """

    peer_at = Position()  # where the peer says that it is in the run
    bytes_moved = 0  # in both directions, apart from signs of life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    @abstractmethod
    def address(self) -> str:
        """The peer's address, for logs."""

    @abstractmethod
    def beat(self, silent_s: float) -> None:
        """Say that we are here, if we have said nothing for so long; called from a thread."""

    @abstractmethod
    def last_words(self) -> PeerFailed | None:
        """Return why the peer ended the run, if its word has already arrived.

        To be asked after a send failed: the peer may have said why before it closed.
        """

    @abstractmethod
    def dismiss(self, message_type: MessageType, reason: str) -> None:
        """Send a last message and close, leaving the peer the time to read it."""

    @abstractmethod
    def part(self) -> None:
        """Close after our last message, leaving the peer the time to read it."""

    @abstractmethod
    def close(self) -> None:
        """Close the channel; a thread that waits on it wakes with ``ConnectionLost``."""


class Member(Channel):
    """One of many channels: its messages are read ahead of whoever takes them."""

    num_came = 0  # messages
    settled = False  # only its end, and messages that are waited for, are of interest

    @abstractmethod
    def ending(self) -> SflError | None:
        """Return why the peer takes no further part: its last words, or that it is gone."""

    @abstractmethod
    def silent_s(self) -> float:
        """Return for how long the peer has sent nothing that we would have read."""

    @abstractmethod
    def age_s(self) -> float:
        """Return for how long it has been there."""


class Members(Protocol):
    """All members of one party, with one place to wait for them."""

    heartbeat_s: float  # how often we want to hear from who has registered

    @property
    def members(self) -> Sequence[Member]:
        """Those that are open."""

    def until(self, ready: Callable[[], T | None], timeout_s: float | None = None) -> T | None:
        """Return what ``ready`` finds once it finds something; None after ``timeout_s``.

        It is asked whenever a member, or ``wake``, gives reason to.
        """

    def wake(self) -> None:
        """Let who waits look again; called from other threads."""

    def first(self, links: Collection[Link]) -> Member | None:
        """Return the one of ``links`` whose message has waited longest, or that has failed."""

    def news(self) -> Sequence[Member]:
        """Return members that have failed, and those not settled of whom a message waits."""

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        """Return the one of ``links`` that ``first`` finds, once there is one or a gate opens.

        Raises:
            ConnectionLost, PeerFailed: another member that has registered has ended.
        """

    def drop(
        self, member: Member, reason: str, last_words: MessageType = MessageType.INVALID_MESSAGE
    ) -> None:
        """Turn one member away, leaving it the time to read why."""

    def turned_away(self, address: str, reason: str, *, aloud: bool = True) -> None:
        """Tell people of one that is turned away; not ``aloud``: in the log alone."""

    def end(self, reason: str, last_words: MessageType = MessageType.ABORT) -> None:
        """Close every member, telling those still open why; nobody else is let in."""


class Dialler(Protocol):
    """Makes channels to servers."""

    def connect(self, address: str, patience_s: float, *, again: bool = False) -> Channel:
        """Connect, trying for so long; ``again``: the server was there before.

        Raises:
            ConfigError: it is no address.
            RunError: nobody answered in time.
            AuthError: who answered is not to be trusted.
            ConnectionLost: it was lost at once.
        """
