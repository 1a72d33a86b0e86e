"""The four calls of a wire, which are all that a conversation sees of it.

::

    send_message_as_json(type, sender, receiver, content)    ->  receive_message_as_json(type)
    send_file(type, data, sender, receiver, content)         ->  receive_file(type)

A transport provides ``_send`` and ``_next`` beneath them: TCP in ``transport``, a hand-over within
the process in ``simulate``.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from sfl.errors import (
    ConnectionLost,
    Damaged,
    LetGo,
    NotYet,
    PeerCannot,
    PeerFailed,
    PeerLeft,
    PeerStopped,
    ProtocolError,
    SflError,
    shortened,
)
from sfl.files.torch_reader import Buffer
from sfl.values import Position
from sfl.wire.messages import Limits, Message, MessageType

_NOWHERE = Position()
CLIENT, MAIN = "client", "main"  # who connects: a client, or the main server to the fed server
ANY_ID: Final = -1  # of a client that takes what is free
# What messages carry, to tell where a run's bytes go; those that are not listed carry "control".
KINDS = {
    MessageType.TRAINING_LABELS: "labels",
    MessageType.TRAINING_FEATURES: "activations",
    MessageType.TRAINING_GRADS: "gradients",
    MessageType.REQUEST_TO_SEND_FILE: "weights",
    MessageType.SEND_FILE: "weights",
    MessageType.WEIGHTS_STORED: "weights",
    MessageType.SEND_MODEL: "weights",
    MessageType.SEND_AGGREGATED_MODEL: "weights",
    MessageType.VALIDATION_LABELS: "validation",
    MessageType.VALIDATION_FEATURES: "validation",
    MessageType.VALIDATION_RESULT: "validation",
}
CONTROL = "control"
KINDS_UP = ("labels", "activations", "gradients", "weights", "validation", CONTROL)
KINDS_DOWN = ("gradients", "weights", "validation", CONTROL)
# What ends a conversation, and how to say so.
LAST_WORDS = {
    MessageType.ABORT: ("stopped", PeerStopped),
    MessageType.END_RUN: ("ended the run", PeerFailed),
    MessageType.INVALID_MESSAGE: ("refused", PeerFailed),
    MessageType.FAILED: ("failed", PeerCannot),
    MessageType.UNREGISTER: ("left", PeerLeft),
    MessageType.TRY_AGAIN: ("closed this connection", LetGo),
}


def is_last(message: Message) -> bool:
    """Say whether a peer ends the conversation with this, and why; a plain goodbye has no why."""
    plain = message.type is MessageType.UNREGISTER and not message.content
    return message.type in LAST_WORDS and not plain


def last_words_for(error: SflError) -> MessageType:
    """Return with which message a server ends a connection: whether to come back with a new one."""
    if isinstance(error, ConnectionLost | Damaged | NotYet | PeerStopped):
        return MessageType.TRY_AGAIN
    return MessageType.INVALID_MESSAGE


@dataclass(frozen=True)
class Peer:
    """Who a connecting party has proved to be."""

    role: str  # CLIENT or MAIN
    client: int = ANY_ID  # with a token for all, the id that it asked for

    def __str__(self) -> str:
        return "the main server" if self.role == MAIN else f"client_{self.client}"

    @property
    def owner(self) -> str:
        """The name under which a file of tokens has its token."""
        return MAIN if self.role == MAIN else str(self.client)


@dataclass(slots=True)
class Counters:
    """What passed over a connection so far; seconds by what this side was doing.

    ``waiting_s`` ends with the first byte of a message, ``receiving_s`` with its last.
    ``sent`` and ``received`` have the bytes by what was carried; a round trip is one or more
    messages of the peer and what this side says to them.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    sending_s: float = 0.0
    waiting_s: float = 0.0
    receiving_s: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    round_trips: int = 0

    def copy(self) -> "Counters":
        return replace(self, sent=self.sent.copy(), received=self.received.copy())

    def add(self, other: "Counters") -> None:
        """Count what passed over another connection as well."""
        for spec in fields(self):
            setattr(self, spec.name, getattr(self, spec.name) + getattr(other, spec.name))


class Link(ABC):
    """The four calls on top of two hooks: ``_send(message)`` and ``_next()``."""

    limits = Limits()  # what we accept from the peer, where somebody checks it
    in_process = False  # whether the peer is in this process
    heartbeat_s = 0.0  # how often the peer wants to hear from us, where it can tell

    def __init__(self, name: str = "", peer_name: str = "") -> None:
        self.counters = Counters()
        self.name = name  # what we call ourselves, and the peer, in messages and errors
        self.peer_name = peer_name
        self.must_prove = False  # whether the peer has to prove who it is
        self.proved: Peer | None = None  # who it has proved to be
        self.proved_run = ""  # that the server has proved to have, if it had to
        self.certificate = b""  # hash of the server's, under TLS
        self.on_notice: Callable[[str], None] | None = None
        self.at = _NOWHERE  # where this side is in the run, for its signs of life
        self._answers = False  # whether the peer has said something since we last did

    def check_proved(self, peer: Peer) -> None:
        """See that the peer is who it now says that it is, if it had to prove it.

        Raises:
            ProtocolError: it has proved to be somebody else, or nothing.
        """
        if (self.must_prove or self.proved) and self.proved != peer:
            raise ProtocolError(f"registers as {peer}, but has proved to be {self.proved}")

    def has_sent(self) -> bool:
        """Say whether all that was sent is on its way: a gate for who sends without being asked."""
        return True

    @property
    def peer_title(self) -> str:
        return {"": "the peer", "server": "the server"}.get(self.peer_name, self.peer_name)

    @abstractmethod
    def _send(self, message: Message) -> int:
        """Send one message; return its number of bytes on the wire."""

    @abstractmethod
    def _next(self) -> Message:
        """Return the next message, waiting for it."""

    def _say(self, message: Message) -> None:
        num_bytes = self._send(message)
        self.counters.sent[KINDS.get(message.type, CONTROL)] += num_bytes
        self.counters.round_trips += self._answers
        self._answers = False

    def _hear(self) -> Message:
        message = self._next()
        num_bytes = message.head_bytes + len(message.payload)
        self.counters.received[KINDS.get(message.type, CONTROL)] += num_bytes
        self._answers = True
        return message

    def send_message_as_json(
        self, message_type: MessageType, sender: str = "", receiver: str = "", content: Any = "",
        *, at: Position = _NOWHERE,
    ) -> None:  # fmt: skip
        """Send one message; ``content`` is any JSON value.

        Raises:
            ConnectionLost: the peer is gone, or takes nothing for the length of the deadline.
        """
        sender, receiver = sender or self.name, receiver or self.peer_name
        self._say(Message(message_type, sender, receiver, content, at))

    def send_file(
        self, message_type: MessageType, data: Buffer, sender: str = "", receiver: str = "",
        content: Any = "", *, at: Position = _NOWHERE, checksum: str = "",
    ) -> None:  # fmt: skip
        """Send one message with the bytes of a ``torch.save`` file straight behind it.

        ``checksum`` is the file's, if somebody has computed it.

        Raises:
            ConnectionLost: as ``send_message_as_json``.
        """
        sender, receiver = sender or self.name, receiver or self.peer_name
        self._say(Message(message_type, sender, receiver, content, at, data, 0, checksum))

    def receive_message_as_json(
        self, *expected: MessageType, at: Position | None = None
    ) -> Message:
        """Return the next message, one of the types ``expected`` and, if given, of position ``at``.

        Notices (``MESSAGE``) that come before it go to ``on_notice``.

        Raises:
            ProtocolError: something else came, or bytes that are no message.
            IntegrityError: its file was damaged on the way.
            PeerFailed: the peer refused us or ended the run, and says why.
            ConnectionLost: the peer is gone, or silent for the length of the deadline.
        """
        while True:
            message = self._hear()
            if message.type is MessageType.MESSAGE and self.on_notice is not None:
                self.on_notice(one_line(message.content))
            else:
                break
        wanted = " or ".join(expected) or "nothing"
        if message.type not in expected:
            if is_last(message):
                raise self.peer_failed(message)
            raise ProtocolError(f"{self.peer_title} sent {message.type}, expected was {wanted}")
        if at is not None and message.at != at:
            raise ProtocolError(
                f"{self.peer_title} sent {message.type} for {message.at}, expected was {at}"
            )
        return message

    def peer_failed(self, last_words: Message) -> PeerFailed:
        """Return the error for a peer's last words."""
        verb, kind = LAST_WORDS[last_words.type]
        return kind(f"{self.peer_title} {verb}: {one_line(last_words.content)}")

    def receive_file(self, *expected: MessageType, at: Position | None = None) -> Message:
        """As ``receive_message_as_json``, for message types that carry a file (``payload``)."""
        return self.receive_message_as_json(*expected, at=at)


class Absent(Link):
    """The link to a client that is not there."""

    def __init__(self, client: int) -> None:
        super().__init__("server", f"client_{client}")

    def _send(self, message: Message) -> int:
        raise ConnectionLost(f"{self.peer_title} is not there")

    def _next(self) -> Message:
        raise ConnectionLost(f"{self.peer_title} is not there")


def one_line(text: object, max_length: int = 500) -> str:
    """Return a peer's text fit for one line of a log: printable, bounded."""
    return "".join(c if c.isprintable() else " " for c in shortened(text, max_length))
