"""Seal what passes through hops for the other end of the chain: client and server.

Both ends draw an X25519 key pair for each connection and exchange the public halves while the
client joins; HKDF (RFC 5869) makes a key for each direction of the shared secret. ChaCha20-Poly1305
(RFC 8439) then encrypts ids, labels, weights, results, and tensors that no hop computes with; a hop
passes them on unread, and a change of them is noticed. A hop that exchanges the public halves
for its own could still read all: with a secret that only the two ends know, it cannot.
"""

import base64
import json
import struct
from dataclasses import dataclass, replace
from typing import Final, Protocol

from sfl.errors import Damaged, ProtocolError, not_installed
from sfl.files import strict_json
from sfl.files.checksum import checksum
from sfl.wire.messages import Message, MessageType

PADDED_TO: Final = 256  # bytes, of sealed JSON
# Characters of the longest numbers in figures, as JSON has them: counts below 2^31, and floats.
COUNT_WIDTH: Final = 10
FLOAT_WIDTH: Final = len("-1.7976931348623157e+308")
OVERHEAD_BYTES: Final = 16  # that sealing adds to a file: the tag
# Sealed as a whole: no hop needs them.
_WHOLE = frozenset(
    {
        MessageType.SAMPLE_IDS,
        MessageType.TRAINING_LABELS,
        MessageType.VALIDATION_LABELS,
        MessageType.VALIDATION_RESULT,
        MessageType.VALIDATION_DONE,
        MessageType.TRAINING_DONE,
        MessageType.SEND_MODEL,
        MessageType.SEND_AGGREGATED_MODEL,
    }
)
# Sealed as a whole at cuts between client and server; else for the hop beside the cut, except for
# the figures that come with gradients.
_TENSORS = frozenset(
    {
        MessageType.TRAINING_FEATURES,
        MessageType.VALIDATION_FEATURES,
        MessageType.TRAINING_GRADS,
    }
)


class SealKey:
    """One end's key pair, for one connection.

    Raises:
        ConfigError: the package ``cryptography`` is missing.
    """

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        except ModuleNotFoundError as error:
            raise not_installed("cryptography") from error
        self._private = X25519PrivateKey.generate()

    @property
    def public(self) -> str:
        """The public half, in hexadecimal."""
        return self._private.public_key().public_bytes_raw().hex()

    def agree(self, theirs: str, about: "About", secret: bytes = b"") -> "Seal":
        """Return the seal with the other end, given its public half.

        Raises:
            ProtocolError: it is none.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        try:
            other = X25519PublicKey.from_public_bytes(bytes.fromhex(theirs))
            shared = self._private.exchange(other)
        except ValueError as error:
            raise ProtocolError("the other end of the chain gives no key to seal with") from error
        client, server = (self.public, theirs) if about.is_client else (theirs, self.public)
        info = json.dumps(["SFL seal", about.run, about.client, client, server]).encode()
        made = HKDF(SHA256(), 64, salt=secret, info=info).derive(shared)
        up, down = ChaCha20Poly1305(made[:32]), ChaCha20Poly1305(made[32:])
        sends, receives = (up, down) if about.is_client else (down, up)
        return Seal(sends, receives, about)


@dataclass(frozen=True)
class About:
    """What a seal is for."""

    run: str
    client: int
    is_client: bool  # which end this is
    passing: frozenset[int]  # links of the cuts between client and server
    has_figures: bool = True  # whether figures come with gradients


class Aead(Protocol):
    """Encryption with associated data: a nonce, the data, and what they are bound to."""

    def encrypt(self, nonce: bytes, data: bytes, bound: bytes, /) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, bound: bytes, /) -> bytes: ...


class Seal:
    """Closes and opens the messages of one connection; each is numbered."""

    def __init__(self, sends: Aead, receives: Aead, about: About) -> None:
        self._sends, self._receives, self._about = sends, receives, about
        self._sent, self._received = 0, -1

    def close(self, message: Message) -> Message:
        """Return a message as it is sent."""
        if not self._seals_content(message):
            return message
        number, self._sent, bound = self._sent, self._sent + 1, _bound(message)
        sealed = self._sends.encrypt(_nonce(number, 0), _padded(message.content), bound)
        content = {"number": number, "sealed": base64.b64encode(sealed).decode()}
        if not self._seals_file(message):
            return replace(message, content=content)
        data = self._sends.encrypt(_nonce(number, 1), bytes(message.payload), bound)
        return replace(message, content=content, payload=data, checksum=checksum(data))

    def open(self, message: Message) -> Message:
        """Return a message as it was given to ``close`` at the other end.

        Raises:
            ProtocolError: it was not sealed, or is an earlier one.
            Damaged: it was changed on the way.
        """
        if not self._seals_content(message):
            return message
        number, bound = message.get("number", int), _bound(message)
        if not self._received < number < 2**63:
            raise ProtocolError(f"{message.type} is sealed as an earlier message")
        self._received = number
        try:
            sealed = base64.b64decode(message.get("sealed", str), validate=True)
            content = strict_json.loads(self._opened(_nonce(number, 0), sealed, bound))
        except ValueError as error:
            raise ProtocolError(f"{message.type} is not sealed as it must be") from error
        if not self._seals_file(message):
            return replace(message, content=content)
        data = self._opened(_nonce(number, 1), bytes(message.payload), bound)
        return replace(message, content=content, payload=data, checksum=checksum(data))

    def _seals_content(self, message: Message) -> bool:
        is_of_figures = message.type is MessageType.TRAINING_GRADS and self._about.has_figures
        return is_of_figures or self._is_whole(message)

    def _seals_file(self, message: Message) -> bool:
        return bool(message.payload) and self._is_whole(message)

    def _is_whole(self, message: Message) -> bool:
        passes = message.type in _TENSORS and message.at.link in self._about.passing
        return passes or message.type in _WHOLE

    def _opened(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._receives.decrypt(nonce, data, bound)
        except InvalidTag as error:
            raise Damaged(
                "a sealed message was changed on its way, or sealed for others"
            ) from error


def _padded(content: object) -> bytes:
    """Return content as JSON, as long whatever the digits of its numbers: these may tell of labels.

    What has a length of its own is how many numbers there are, and text.
    """
    text = json.dumps(content)
    widest = json.loads(
        text,
        parse_int=lambda digits: digits.rjust(COUNT_WIDTH),
        parse_float=lambda digits: digits.rjust(FLOAT_WIDTH),
        parse_constant=lambda name: name.rjust(FLOAT_WIDTH),
    )
    longest = len(json.dumps(widest))
    return text.ljust(-longest % PADDED_TO + longest).encode()


def _nonce(number: int, part: int) -> bytes:
    """Return the nonce of a message's content (part 0) or file (1); each is used once."""
    return struct.pack(">IQ", part, number)


def _bound(message: Message) -> bytes:
    """Return what a sealed message is bound to: its type, and its place but for the cut."""
    at = message.at
    return json.dumps([message.type, at.run, at.round, at.step, at.client]).encode()
