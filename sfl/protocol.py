"""Messages and frames: bytes to messages and back, without any I/O.

A frame on the wire (all integers big-endian)::

    offset  bytes  what
    0       4      magic  b"SFL\\n"
    4       1      protocol version (2)
    5       1      flags, 0 (a receiver refuses any bit that it does not know)
    6       2      reserved, 0
    8       4      length of the JSON in bytes
    12      8      length of the payload in bytes
    20      4      CRC-32 of the JSON
    24      4      CRC-32 of the 24 bytes before
    28      ...    the JSON, UTF-8; if a payload follows, the payload's CRC-32 is in it
    ...     ...    the payload: exactly the bytes of a ``torch.save`` file, or nothing

So every byte is under a checksum, and each part is compared before it is used: the head before its
lengths are believed, the JSON before it is parsed, the payload before the message is handed on.
Both lengths are checked against the receiver's limits before anything is allocated. The checksums
find damage; they are no protection against somebody who alters bytes on purpose.

Version 1 (SFL 0.1) has a head of 20 bytes, without the two checksums, and the same JSON.
"""

import builtins
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeVar

from sfl import __version__
from sfl.crc import crc32
from sfl.envelope import Envelope, read_envelope, write_envelope
from sfl.errors import Damaged, OtherVersion, ProtocolError, quoted
from sfl.payload import InMemory, MakeStore, Store

T = TypeVar("T")

MAGIC: Final = b"SFL\n"
VERSION: Final = 2
HEAD: Final = struct.Struct(">4sBBHIQII")
_CHECKED: Final = struct.Struct(">4sBBHIQI")  # what the head's own checksum covers
_HEAD_1: Final = struct.Struct(">4sBBHIQ")
_START: Final = MAGIC + bytes([VERSION])
RELEASES: Final = {1: "0.1", 2: "0.2"}  # of SFL, by the version of the protocol that they speak
MAX_JSON_BYTES: Final = 64 * 1024  # a REQUEST_TO_START of 1,000 class names fits
# Head and JSON of a message usually arrive in one read; longer payloads go straight to their own
# buffer, so that at most this much of a payload is copied twice.
READ_AHEAD_BYTES: Final = 4096


class MessageType(StrEnum):
    """What a message says. C: sent by clients, S: by the server."""

    AUTHENTICATE = "AUTHENTICATE"  # C: let us prove that we share a token; a nonce
    CHALLENGE = "CHALLENGE"  # S: the run, a nonce, my proof
    PROOF = "PROOF"  # C: my proof
    REGISTER = "REGISTER"  # C: here I am; wanted client id, fingerprint
    REGISTERED = "REGISTERED"  # S: you are client k of this run; the RunConfig
    CHECK = "CHECK"  # C: what would come of a REGISTER? client id, fingerprint
    CHECKED = (
        "CHECKED"  # S: as REGISTERED, and no place is taken; then, what of the report is wrong
    )
    REQUEST_TO_START = "REQUEST_TO_START"  # C: my data are loaded: samples, classes, shape
    MESSAGE = "MESSAGE"  # S: a notice for people, at any moment
    GO_ON = "GO_ON"  # S: this round is done (-1: none is); which front the next starts from
    START_TRAINING = "START_TRAINING"  # S: train in round r: from which front, how many steps
    TRAINING_LABELS = "TRAINING_LABELS"  # C: file, the labels of a step
    TRAINING_FEATURES = "TRAINING_FEATURES"  # C: file, the cut-layer activations of a step
    TRAINING_GRADS = "TRAINING_GRADS"  # S: file, their gradients (C: of the weights); loss and hits
    TRAINING_FIGURES = "TRAINING_FIGURES"  # C: file, loss and hits of each step it took alone
    ROUND_TRAINED = "ROUND_TRAINED"  # C: my steps of this round are done; seconds spent
    REQUEST_TO_SEND_FILE = "REQUEST_TO_SEND_FILE"  # C, S: a large file is offered: size, checksum
    SEND_FILE = "SEND_FILE"  # C, S: send it, from this offset on
    WEIGHTS_STORED = "WEIGHTS_STORED"  # C, S: weights lie in the store: name, checksum
    SEND_MODEL = "SEND_MODEL"  # C, S: file, client-side weights (S: the initial ones)
    SEND_AGGREGATED_MODEL = "SEND_AGGREGATED_MODEL"  # S: file, averaged or updated ones
    START_VALIDATION = "START_VALIDATION"  # S: evaluate the round's outcome: which front
    VALIDATION_LABELS = "VALIDATION_LABELS"  # C: file, labels of an evaluation batch
    VALIDATION_FEATURES = "VALIDATION_FEATURES"  # C: file, its activations
    VALIDATION_RESULT = (
        "VALIDATION_RESULT"  # S, C: samples, hits and summed loss of a batch, a part
    )
    VALIDATION_DONE = "VALIDATION_DONE"  # S: the round is over; its figures
    TRAINING_DONE = "TRAINING_DONE"  # S: the run is over; its figures
    UNREGISTER = "UNREGISTER"  # C: goodbye after TRAINING_DONE; or, with a reason, for now
    TRY_AGAIN = "TRY_AGAIN"  # S: I close this connection, and why; connect anew
    HEARTBEAT = "HEARTBEAT"  # C, S: I am here; at any moment, and not counted
    INVALID_MESSAGE = "INVALID_MESSAGE"  # C, S: I refuse what you sent, and why
    FAILED = "FAILED"  # C: I cannot compute my part, and why: another try fails as well
    ABORT = "ABORT"  # C, S: I cannot go on, and why
    END_RUN = "END_RUN"  # S: nor can I when I am started again, and why


_TYPES: Final = {message_type.value: message_type for message_type in MessageType}

# These messages are followed by a file, always; the others never are.
FILE_TYPES: Final = frozenset(
    {
        MessageType.TRAINING_LABELS,
        MessageType.TRAINING_FEATURES,
        MessageType.TRAINING_GRADS,
        MessageType.TRAINING_FIGURES,
        MessageType.SEND_MODEL,
        MessageType.SEND_AGGREGATED_MODEL,
        MessageType.VALIDATION_LABELS,
        MessageType.VALIDATION_FEATURES,
    }
)


class Position(NamedTuple):
    """Where in a run a message belongs; -1 and "" where it belongs nowhere in particular."""

    run: str = ""
    round: int = -1
    step: int = -1
    client: int = -1
    link: int = 0  # which cut of the model; 0 is the first


class File(NamedTuple):
    """The bytes of a ``torch.save`` file, and their checksum; "" if nobody has computed it."""

    data: bytes | bytearray | memoryview
    checksum: str = ""


@dataclass(slots=True)  # frozen, it would take several times as long to make
class Message:
    """One message; ``payload`` holds the bytes of a file, or nothing.

    ``head_bytes`` is what else of it came over the wire; 0 if it has not yet. ``checksum`` is the
    payload's; "" if nobody has computed it.
    """

    type: MessageType
    sender: str = ""
    receiver: str = ""
    content: Any = ""  # any JSON value
    at: Position = field(default_factory=Position)
    payload: bytes | bytearray | memoryview = b""
    head_bytes: int = field(default=0, compare=False)
    checksum: str = field(default="", compare=False)

    @property
    def file(self) -> File:
        """What it carries."""
        return File(self.payload, self.checksum)

    def get(self, name: str, kind: builtins.type[T]) -> T:
        """Return a field of the content, which must be an object, or raise ``ProtocolError``."""
        value = self.content.get(name) if isinstance(self.content, dict) else None
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            raise ProtocolError(f"{self.type} lacks {name!r}, of type {kind.__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts: no file of a type that ``payload_bytes`` does not name."""

    json_bytes: int = MAX_JSON_BYTES
    payload_bytes: Mapping[MessageType, int] = field(default_factory=dict)
    store: MakeStore = InMemory  # where payloads go

    @property
    def largest_payload_bytes(self) -> int:
        return max(self.payload_bytes.values(), default=0)


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the checksum of ``data`` as the wire and the manifests write it."""
    return checksum_text(crc32(data))


def checksum_text(crc: int) -> str:
    """Return a CRC-32 as the wire and the manifests write it."""
    return f"crc32:{crc:08x}"


def crc_of(text: str) -> int | None:
    """Return the CRC-32 that a checksum says; None if it says none."""
    return int(text[6:], 16) if text else None


def pack_head(
    json_bytes: int, payload_bytes: int, *, crc: int = 0, version: int = VERSION, flags: int = 0
) -> bytes:
    """Return the head of a frame; ``crc`` is the JSON's."""
    if version == 1:
        return _HEAD_1.pack(MAGIC, version, flags, 0, json_bytes, payload_bytes)
    checked = _CHECKED.pack(MAGIC, version, flags, 0, json_bytes, payload_bytes, crc)
    return checked + crc32(checked).to_bytes(4, "big")


def encode_head(message: Message, *, version: int = VERSION) -> bytes:
    """Return head and JSON of a frame; the payload's bytes follow it on the wire unchanged.

    ``version`` is of a peer that is told in its own version that we speak another.
    """
    assert (message.type in FILE_TYPES) == bool(message.payload), message.type
    checked = message.checksum or checksum(message.payload) if message.payload else ""
    sender, receiver, content = message.sender, message.receiver, message.content
    text = write_envelope(Envelope(message.type, sender, receiver, message.at, content, checked))
    return pack_head(len(text), len(message.payload), crc=crc32(text), version=version) + text


def _type_of(envelope: Envelope, *, has_payload: bool) -> MessageType:
    """Return a message's type, which must be one that carries a payload, or not."""
    if (message_type := _TYPES.get(envelope.type)) is None:
        raise ProtocolError(f"unknown message type {quoted(envelope.type, 40)}")
    if (message_type in FILE_TYPES) != has_payload:
        wrong = "comes without its file" if message_type in FILE_TYPES else "carries a payload"
        raise ProtocolError(f"{message_type} {wrong}")
    return message_type


_NOTHING: Final = InMemory(0)  # the payload of a message without one


class _Head(NamedTuple):
    """What the head of a frame says."""

    json_bytes: int
    payload_bytes: int
    crc: int  # of the JSON


def _other_version(version: int) -> OtherVersion:
    """Return the error for a peer of another version of the protocol."""
    theirs = f"SFL {RELEASES[version]}" if version in RELEASES else "another release"
    ours = f"SFL {__version__} (protocol {VERSION})"
    return OtherVersion(
        f"it runs {theirs} (protocol {version}), this is {ours}: install SFL {__version__} there,"
        " or the other's release here",
        version=version,
        answer=f"this is {ours}, and you run {theirs} (protocol {version}): install SFL"
        f" {__version__} on your machine",
    )


class Decoder:
    """Turn a stream of bytes into messages, whatever pieces it arrives in.

    The caller reads into ``get_buffer()``, says with ``advance(n)`` how much came, and takes what
    is complete with ``next_message()``. Nothing is allocated for a payload before its message type
    and length have been checked against ``limits``, which may be replaced between messages.

    ``next_message`` raises ``ProtocolError`` for bytes that are no frame or exceed a limit,
    ``OtherVersion`` for a frame of another version of the protocol, and ``Damaged`` where a
    checksum differs. The decoder is of no use afterwards.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._ahead = bytearray(READ_AHEAD_BYTES)
        self._start = 0  # the unread bytes of the stream are _ahead[_start:_end]
        self._end = 0
        self._head: _Head | None = None  # once it is read
        self._is_known = False  # the peer has sent a whole message: it speaks as we do
        self._begun: tuple[MessageType, Envelope] | None = None  # once the JSON is read
        self._payload: Store = _NOTHING
        self._missing = 0  # bytes of it

    @property
    def inside(self) -> str:
        """Which part of a message the stream stands in: "", "head", "JSON" or "payload"."""
        if self._begun is not None:
            return "payload"
        if self._head is not None:
            return "JSON"
        return "head" if self._end > self._start else ""

    def get_buffer(self) -> memoryview:
        """Return where the next bytes of the stream go; never empty."""
        if self._begun is not None and self._start == self._end:
            return self._payload.get_buffer()
        if self._start:  # move what is unread to the front: less than one head and JSON
            unread = self._ahead[self._start : self._end]
            self._ahead[: len(unread)] = unread
            self._start, self._end = 0, len(unread)
        wanted = self._head.json_bytes if self._head is not None else HEAD.size
        if len(self._ahead) < wanted:
            self._ahead.extend(bytes(wanted - len(self._ahead)))  # within limits.json_bytes
        return memoryview(self._ahead)[self._end :]

    def advance(self, num_bytes: int) -> None:
        """Take note that ``num_bytes`` of the stream now lie in the buffer last returned."""
        if self._begun is not None and self._start == self._end:
            self._note_payload(num_bytes)
        else:
            self._end += num_bytes

    def next_message(self) -> Message | None:
        """Return the next complete message, or None when more bytes are needed."""
        if self._head is None:
            self._check_start()
            head = self._take(HEAD.size)
            if head is None:
                return None
            self._head = self._parse_head(head)
        json_bytes, payload_bytes, crc = self._head
        if self._begun is None:
            text = self._take(json_bytes)
            if text is None:
                return None
            if crc32(text) != crc:
                raise Damaged("a message's JSON arrived damaged: its checksum differs")
            envelope = read_envelope(text, has_payload=payload_bytes > 0)
            message_type = _type_of(envelope, has_payload=payload_bytes > 0)
            allowed = self.limits.payload_bytes.get(message_type, 0)
            if payload_bytes > allowed:
                raise ProtocolError(
                    f"{message_type} announces a payload of {payload_bytes} bytes;"
                    f" at most {allowed} are accepted here"
                )
            self._begun, self._payload = (message_type, envelope), self.limits.store(payload_bytes)
            self._missing = payload_bytes
        available = min(self._end - self._start, self._missing)
        if available:
            part = self._ahead[self._start : self._start + available]
            self._payload.get_buffer()[:available] = part
            self._start += available
            self._note_payload(available)
        return None if self._missing else self._finish()

    def forget(self) -> None:
        """Let go of a payload that has begun to come; the decoder is of no use afterwards."""
        self._payload = _NOTHING

    def _take(self, num_bytes: int) -> bytearray | None:
        if self._end - self._start < num_bytes:
            return None
        self._start += num_bytes
        return self._ahead[self._start - num_bytes : self._start]

    def _note_payload(self, num_bytes: int) -> None:
        self._payload.advance(num_bytes)
        self._missing -= num_bytes

    def _parse_head(self, head: bytearray) -> _Head:
        self._check_head(head)
        _, _, flags, reserved, json_bytes, payload_bytes, crc, _ = HEAD.unpack(head)
        if flags or reserved:
            raise ProtocolError("a frame sets flags that this version does not know")
        if json_bytes > self.limits.json_bytes:
            raise ProtocolError(
                f"a message announces {json_bytes} bytes of JSON;"
                f" at most {self.limits.json_bytes} are accepted here"
            )
        if payload_bytes > self.limits.largest_payload_bytes:
            raise ProtocolError(
                f"a message announces a payload of {payload_bytes} bytes;"
                f" at most {self.limits.largest_payload_bytes} are accepted here"
            )
        return _Head(json_bytes, payload_bytes, crc)

    def _check_start(self) -> None:
        """Refuse at once who speaks something else, even if too little for a head comes."""
        if self._is_known:
            return
        start = self._ahead[self._start : min(self._start + len(MAGIC), self._end)]
        if sum(a != b for a, b in zip(start, MAGIC, strict=False)) > 1:  # more than a flipped bit
            raise ProtocolError("the peer does not speak the SFL protocol")

    def _check_head(self, head: bytearray) -> None:
        """See that a head is of our version of the protocol, and as it was sent.

        A peer that has sent a whole message speaks as we do; before that, a head whose checksum
        fits our own first bytes is one of ours, whatever its first bytes are now.
        """
        start, rest, crc = head[: len(_START)], head[len(_START) : -4], head[-4:]
        whole = crc32(_START + rest).to_bytes(4, "big") == crc
        if whole and start == _START:
            return
        if whole or start == _START or self._is_known:
            raise Damaged("the head of a message arrived damaged: its checksum differs")
        if start[:-1] != MAGIC:
            raise ProtocolError("the peer does not speak the SFL protocol")
        raise _other_version(start[-1])

    def _finish(self) -> Message:
        assert self._head is not None
        assert self._begun is not None
        head_bytes, (message_type, envelope) = HEAD.size + self._head.json_bytes, self._begun
        self._head = self._begun = None
        (payload, crc), self._payload = self._payload.whole(), _NOTHING
        if message_type in FILE_TYPES and checksum_text(crc) != envelope.checksum:
            raise Damaged(f"the file of a {message_type} arrived damaged: its checksum differs")
        self._is_known = True
        return Message(
            message_type, envelope.sender, envelope.receiver, envelope.content,
            Position(*envelope.at), payload, head_bytes, envelope.checksum,
        )  # fmt: skip
