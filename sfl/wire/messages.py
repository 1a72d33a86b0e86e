"""The messages of the protocol, and what is accepted of them."""

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar

from sfl.errors import ProtocolError
from sfl.files.checksum import File
from sfl.values import Position
from sfl.wire.payload import InMemory, MakeStore

T = TypeVar("T")
MAX_JSON_BYTES: Final = 64 * 1024  # a REQUEST_TO_START of 1,000 class names fits


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
    TRAINING_GRADS = "TRAINING_GRADS"  # S: file, their gradients (C: of the weights); loss, counts
    TRAINING_FIGURES = "TRAINING_FIGURES"  # C: file, loss and counts of each step it took alone
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
        "VALIDATION_RESULT"  # S, C: samples, counts and summed loss of a batch, a part
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
