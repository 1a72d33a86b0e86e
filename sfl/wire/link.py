"""A link to a peer: the four calls through which a conversation sends and receives.

::

    send_message_as_json(type, sender, receiver, content)    ->  receive_message_as_json(type)
    send_file(type, data, sender, receiver, content)         ->  receive_file(type)

A transport implements ``_send`` and ``_next``: TCP in ``sfl.transport``, a queue within the process
in ``sfl.runtime.simulation``.
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
    RunEnded,
    SflError,
    shortened,
)
from sfl.files.torch_reader import Buffer
from sfl.values import Position
from sfl.wire.messages import Limits, Message, MessageType
from sfl.wire.seal import Seal

_NOWHERE = Position()
CLIENT, MAIN = "client", "main"  # roles: a client, or the main server at the fed server
ANY_ID: Final = -1  # client id of a client that accepts any free place
# What messages carry, for statistics of a run's bytes; other types carry "control".
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


def kind_of(message_type: MessageType, link: int) -> str:
    """Return what a message carries; tensors of a step at a further cut are counted by their link.

    For example ``activations`` at the first cut, ``activations_1`` at the second.
    """
    kind = KINDS.get(message_type, CONTROL)
    return f"{kind}_{link}" if link > 0 and kind in ("activations", "gradients") else kind


# Messages that end a conversation: the verb for error messages, and our error.
LAST_WORDS = {
    MessageType.ABORT: ("stopped", PeerStopped),
    MessageType.END_RUN: ("ended the run", RunEnded),
    MessageType.INVALID_MESSAGE: ("refused", PeerFailed),
    MessageType.FAILED: ("failed", PeerCannot),
    MessageType.UNREGISTER: ("left", PeerLeft),
    MessageType.TRY_AGAIN: ("closed this connection", LetGo),
}


def is_last(message: Message) -> bool:
    """Return whether a message ends the conversation; ``UNREGISTER`` does so only with a reason."""
    plain = message.type is MessageType.UNREGISTER and not message.content
    return message.type in LAST_WORDS and not plain


def last_words_for(error: SflError) -> MessageType:
    """Return the message type for a server's error: ``TRY_AGAIN`` if the peer may reconnect."""
    if isinstance(error, ConnectionLost | Damaged | NotYet | PeerStopped):
        return MessageType.TRY_AGAIN
    return MessageType.INVALID_MESSAGE


@dataclass(frozen=True)
class Peer:
    """The identity that a connecting party has proved."""

    role: str  # CLIENT, MAIN, or a hop's, as hop:1
    client: int = ANY_ID  # with a shared token, the id that it asked for; a hop's: for whom

    def __str__(self) -> str:
        client = f"client_{self.client}"
        return {MAIN: "the main server", CLIENT: client}.get(self.role, f"{self.role} for {client}")

    @property
    def owner(self) -> str:
        """The key of its token in a token file."""
        return str(self.client) if self.role == CLIENT else self.role


@dataclass(slots=True)
class Counters:
    """Totals of a connection; seconds by what this side was doing.

    ``waiting_s`` ends with the first byte of a message, ``receiving_s`` with its last.
    ``sent`` and ``received``: bytes by kind, see ``KINDS``. A round trip is one or more messages of
    the peer and this side's reply.
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
        """Add the totals of another connection."""
        for spec in fields(self):
            setattr(self, spec.name, getattr(self, spec.name) + getattr(other, spec.name))


class Link(ABC):
    """The four calls on top of two hooks: ``_send(message)`` and ``_next()``."""

    limits = Limits()  # what we accept from the peer, where it is checked
    in_process = False  # whether the peer is in this process
    heartbeat_s = 0.0  # interval of heartbeats that the peer asks for

    def __init__(self, name: str = "", peer_name: str = "") -> None:
        self.counters = Counters()
        self.name = name  # of this side, in messages and errors
        self.peer_name = peer_name
        self.must_prove = False  # whether the peer has to authenticate
        self.proved: Peer | None = None  # the identity that it has proved
        self.proved_run = ""  # the run that the server has proved to have, if it had to
        self.certificate = b""  # hash of the server's certificate, under TLS
        self.on_notice: Callable[[str], None] | None = None
        self.at = _NOWHERE  # this side's position in the run, for its heartbeats
        self.seal: Seal | None = None  # with the other end of a chain of hops
        self._has_received = False  # whether the peer has sent a message since our last

    def check_proved(self, peer: Peer) -> None:
        """Check the identity that the peer claims against the one it has proved, if it had to.

        Raises:
            ProtocolError: it has proved another identity, or none.
        """
        if (self.must_prove or self.proved) and self.proved != peer:
            raise ProtocolError(f"registers as {peer}, but has proved to be {self.proved}")

    def has_sent(self) -> bool:
        """Return whether all messages have left our buffers: a gate for unrequested messages."""
        return True

    @property
    def peer_title(self) -> str:
        return {"": "the peer", "server": "the server"}.get(self.peer_name, self.peer_name)

    @abstractmethod
    def _send(self, message: Message) -> int:
        """Send one message; return its size on the wire in bytes."""

    @abstractmethod
    def _next(self) -> Message:
        """Wait for the next message and return it."""

    def _send_counted(self, message: Message) -> None:
        if self.seal:
            message = self.seal.close(message)
        num_bytes = self._send(message)
        self.counters.sent[kind_of(message.type, message.at.link)] += num_bytes
        self.counters.round_trips += self._has_received
        self._has_received = False

    def _receive_counted(self) -> Message:
        message = self._next()
        self._count_received(message)
        self._has_received = True
        return self.seal.open(message) if self.seal else message

    def _count_received(self, message: Message) -> None:
        num_bytes = message.head_bytes + len(message.payload)
        self.counters.received[kind_of(message.type, message.at.link)] += num_bytes

    def _is_notice(self, message: Message) -> bool:
        """Return whether a message is a notice; pass it to ``on_notice`` if so."""
        if message.type is not MessageType.MESSAGE or self.on_notice is None:
            return False
        self.on_notice(one_line(message.content))
        return True

    def send_message_as_json(
        self, message_type: MessageType, sender: str = "", receiver: str = "", content: Any = "",
        *, at: Position = _NOWHERE,
    ) -> None:  # fmt: skip
        """Send one message; ``content`` is any JSON value.

        Raises:
            ConnectionLost: the peer has disconnected, or reads nothing until the deadline.
        """
        sender, receiver = sender or self.name, receiver or self.peer_name
        self._send_counted(Message(message_type, sender, receiver, content, at))

    def send_file(
        self, message_type: MessageType, data: Buffer, sender: str = "", receiver: str = "",
        content: Any = "", *, at: Position = _NOWHERE, checksum: str = "",
    ) -> None:  # fmt: skip
        """Send one message followed by the bytes of a ``torch.save`` file.

        ``checksum`` is the file's, if it is already computed.

        Raises:
            ConnectionLost: as in ``send_message_as_json``.
        """
        sender, receiver = sender or self.name, receiver or self.peer_name
        self._send_counted(Message(message_type, sender, receiver, content, at, data, 0, checksum))

    def receive_message_as_json(
        self, *expected: MessageType, at: Position | None = None
    ) -> Message:
        """Return the next message, of a type in ``expected`` and, if given, of position ``at``.

        Notices (``MESSAGE``) before it go to ``on_notice``.

        Raises:
            ProtocolError: another message came, or bytes that are not a message.
            Damaged: its bytes were damaged in transit.
            PeerFailed: the peer refused us or ended the run, with a reason.
            ConnectionLost: the peer has disconnected, or was silent until the deadline.
        """
        while self._is_notice(message := self._receive_counted()):
            pass
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
        """Return our error for a message that ends the conversation."""
        verb, kind = LAST_WORDS[last_words.type]
        return kind(f"{self.peer_title} {verb}: {one_line(last_words.content)}")

    def receive_file(self, *expected: MessageType, at: Position | None = None) -> Message:
        """Do as ``receive_message_as_json``, for message types that carry a file (``payload``)."""
        return self.receive_message_as_json(*expected, at=at)


class Absent(Link):
    """A link to a client that is not connected: every call fails."""

    def __init__(self, client: int) -> None:
        super().__init__("server", f"client_{client}")

    def _send(self, message: Message) -> int:
        raise ConnectionLost(f"{self.peer_title} is not there")

    def _next(self) -> Message:
        raise ConnectionLost(f"{self.peer_title} is not there")


def one_line(text: object, max_length: int = 500) -> str:
    """Return text from a peer as one line for a log: printable, of bounded length."""
    return "".join(c if c.isprintable() else " " for c in shortened(text, max_length))
