"""Encode messages as frames and decode frames as messages, without I/O.

A frame on the wire (all integers big-endian)::

    offset  bytes  what
    0       4      magic  b"SFL\\n"
    4       1      protocol version (3)
    5       1      flags, 0 (a receiver refuses any bit that it does not know)
    6       2      reserved, 0
    8       4      length of the JSON in bytes
    12      8      length of the payload in bytes
    20      4      CRC-32 of the JSON
    24      4      CRC-32 of the 24 bytes before
    28      ...    the JSON, UTF-8; if a payload follows, the payload's CRC-32 is in it
    ...     ...    the payload: exactly the bytes of a ``torch.save`` file, or nothing

A checksum covers every byte, and each part is verified before use: the head before its lengths are
used, the JSON before it is parsed, the payload before the message is returned. Both lengths are
checked against the receiver's limits before memory is allocated. The checksums detect damage, not
deliberate changes.

Version 2 (SFL 0.2) has the same frames. Version 1 (SFL 0.1) has a head of 20 bytes, without the
two checksums, and the same JSON.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from sfl import __version__
from sfl.errors import Damaged, OtherVersion, ProtocolError, quoted
from sfl.files.checksum import checksum, checksum_text, crc32
from sfl.values import Position
from sfl.wire.envelope import Envelope, read_envelope, write_envelope
from sfl.wire.messages import _TYPES, FILE_TYPES, Limits, Message, MessageType
from sfl.wire.payload import InMemory, Store

MAGIC: Final = b"SFL\n"
VERSION: Final = 3
HEAD: Final = struct.Struct(">4sBBHIQII")
_CHECKED: Final = struct.Struct(">4sBBHIQI")  # the part of the head that its CRC covers
_HEAD_1: Final = struct.Struct(">4sBBHIQ")
_START: Final = MAGIC + bytes([VERSION])
RELEASES: Final = {1: "0.1", 2: "0.2", 3: "0.3"}  # protocol version -> release of SFL
# Head and JSON of a message usually arrive in one read. Payloads are read into their own buffer:
# at most this much of one is copied twice.
READ_AHEAD_BYTES: Final = 4096


def pack_head(
    json_bytes: int, payload_bytes: int, *, crc: int = 0, version: int = VERSION, flags: int = 0
) -> bytes:
    """Return the head of a frame; ``crc`` is the JSON's."""
    if version == 1:
        return _HEAD_1.pack(MAGIC, version, flags, 0, json_bytes, payload_bytes)
    checked = _CHECKED.pack(MAGIC, version, flags, 0, json_bytes, payload_bytes, crc)
    return checked + crc32(checked).to_bytes(4, "big")


def encode_head(message: Message, *, version: int = VERSION) -> bytes:
    """Return head and JSON of a frame; the payload follows them unchanged on the wire.

    ``version``: another protocol version, to tell its peer that ours differs.
    """
    assert (message.type in FILE_TYPES) == bool(message.payload), message.type
    checked = message.checksum or checksum(message.payload) if message.payload else ""
    sender, receiver, content = message.sender, message.receiver, message.content
    text = write_envelope(Envelope(message.type, sender, receiver, message.at, content, checked))
    return pack_head(len(text), len(message.payload), crc=crc32(text), version=version) + text


def _type_of(envelope: Envelope, *, has_payload: bool) -> MessageType:
    """Return a message's type; types in ``FILE_TYPES`` need a payload, others must have none."""
    if (message_type := _TYPES.get(envelope.type)) is None:
        raise ProtocolError(f"unknown message type {quoted(envelope.type, 40)}")
    if (message_type in FILE_TYPES) != has_payload:
        wrong = "comes without its file" if message_type in FILE_TYPES else "carries a payload"
        raise ProtocolError(f"{message_type} {wrong}")
    return message_type


_NOTHING: Final = InMemory(0)  # the payload of a message without one


class _Head(NamedTuple):
    """The fields of a frame's head."""

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
    """Decode a stream of bytes, in pieces of any size, into messages.

    The caller reads bytes into ``get_buffer()``, reports their number with ``advance(n)``, and
    takes complete messages with ``next_message()``. A payload is allocated only after its message
    type and length have passed ``limits``, which may be replaced between messages.

    Raises (from ``next_message``; the decoder cannot be used afterwards):
        ProtocolError: the bytes are not a frame, or exceed a limit.
        OtherVersion: a frame has another protocol version.
        Damaged: a checksum differs.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._ahead = bytearray(READ_AHEAD_BYTES)
        self._start = 0  # unread bytes of the stream: _ahead[_start:_end]
        self._end = 0
        self._head: _Head | None = None  # set once it is read
        self._is_known = False  # whether the peer has sent a complete message of our version
        self._begun: tuple[MessageType, Envelope] | None = None  # set once the JSON is read
        self._payload: Store = _NOTHING
        self._missing = 0  # payload bytes still to come

    @property
    def inside(self) -> str:
        """The part of a message that is incomplete: "", "head", "JSON" or "payload"."""
        if self._begun is not None:
            return "payload"
        if self._head is not None:
            return "JSON"
        return "head" if self._end > self._start else ""

    def get_buffer(self) -> memoryview:
        """Return the buffer for the next bytes of the stream; never empty."""
        if self._begun is not None and self._start == self._end:
            return self._payload.get_buffer()
        if self._start:  # move unread bytes (less than a head and JSON) to the front
            unread = self._ahead[self._start : self._end]
            self._ahead[: len(unread)] = unread
            self._start, self._end = 0, len(unread)
        wanted = self._head.json_bytes if self._head is not None else HEAD.size
        if len(self._ahead) < wanted:
            self._ahead.extend(bytes(wanted - len(self._ahead)))  # within limits.json_bytes
        return memoryview(self._ahead)[self._end :]

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` that were read into the last returned buffer."""
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

    def messages_of(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        """Yield the messages that further bytes of the stream complete."""
        while len(data):
            with self.get_buffer() as buffer:
                taken = min(len(buffer), len(data))
                buffer[:taken] = data[:taken]
            self.advance(taken)
            data = data[taken:]
            while (message := self.next_message()) is not None:
                yield message

    def forget(self) -> None:
        """Release a payload that is partly read; the decoder cannot be used afterwards."""
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
        """Refuse a peer of another protocol at its first bytes, before a head is complete."""
        if self._is_known:
            return
        start = self._ahead[self._start : min(self._start + len(MAGIC), self._end)]
        if sum(a != b for a, b in zip(start, MAGIC, strict=False)) > 1:  # more than one flipped bit
            raise ProtocolError("the peer does not speak the SFL protocol")

    def _check_head(self, head: bytearray) -> None:
        """Check that a head is undamaged and of our protocol version.

        A peer that has sent a complete message has our version. Before that, a head whose CRC
        matches with our magic and version in front has damaged first bytes.
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
        (payload, crc), self._payload = self._payload.finish(), _NOTHING
        if message_type in FILE_TYPES and checksum_text(crc) != envelope.checksum:
            raise Damaged(f"the file of a {message_type} arrived damaged: its checksum differs")
        self._is_known = True
        return Message(
            message_type, envelope.sender, envelope.receiver, envelope.content,
            Position(*envelope.at), payload, head_bytes, envelope.checksum,
        )  # fmt: skip
