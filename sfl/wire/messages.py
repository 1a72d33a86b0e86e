"""``MessageType`` and ``Message``, and a receiver's ``Limits``."""

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
MAX_JSON_BYTES: Final = 64 * 1024  # fits a REQUEST_TO_START with 1,000 class names


class MessageType(StrEnum):
    """The types of messages. C: sent by clients, S: by the server."""

    AUTHENTICATE = "AUTHENTICATE"  # C: request mutual proof of a shared token; a nonce
    CHALLENGE = "CHALLENGE"  # S: the run, a nonce, the server's proof
    PROOF = "PROOF"  # C: the client's proof
    REGISTER = "REGISTER"  # C: ask for a place; wanted client id, fingerprint
    REGISTERED = "REGISTERED"  # S: you are client k of this run; the RunConfig
    GO_TO = "GO_TO"  # S: another process of this server serves you; host ("": the same), port
    CHECK = "CHECK"  # C: ask whether REGISTER would succeed; client id, fingerprint
    CHECKED = "CHECKED"  # S: as REGISTERED, but takes no place; then, the report's faults
    REQUEST_TO_START = "REQUEST_TO_START"  # C: data are loaded; samples, classes, shape
    REQUEST_IDS = "REQUEST_IDS"  # S: send the ids of your samples
    SAMPLE_IDS = "SAMPLE_IDS"  # C: file, digests of the ids of all its samples; S: of the run's
    SAMPLE_ORDER = "SAMPLE_ORDER"  # S: how many samples the run has; SAMPLE_IDS follows
    MESSAGE = "MESSAGE"  # S: a notice for the user, at any time
    GO_ON = "GO_ON"  # S: this round is done (-1: none); the front that the next one starts from
    START_TRAINING = "START_TRAINING"  # S: train in round r; starting front, number of steps
    TRAINING_LABELS = "TRAINING_LABELS"  # C: file, the labels of a step
    TRAINING_FEATURES = "TRAINING_FEATURES"  # C: file, the cut-layer activations of a step
    TRAINING_GRADS = "TRAINING_GRADS"  # S: file, their gradients (C: of the weights); loss, counts
    TRAINING_FIGURES = "TRAINING_FIGURES"  # C: file, loss and counts of each step without a cut
    ROUND_TRAINED = "ROUND_TRAINED"  # C: all steps of the round are done; seconds spent
    REQUEST_TO_SEND_FILE = "REQUEST_TO_SEND_FILE"  # C, S: offer a large file: size, checksum
    SEND_FILE = "SEND_FILE"  # C, S: send it from this offset on
    WEIGHTS_STORED = "WEIGHTS_STORED"  # C, S: weights are in the store: name, checksum
    SEND_MODEL = "SEND_MODEL"  # C, S: file, client-side weights (S: the initial ones)
    SEND_AGGREGATED_MODEL = "SEND_AGGREGATED_MODEL"  # S: file, averaged or updated ones
    START_VALIDATION = "START_VALIDATION"  # S: evaluate the round's result; the front to evaluate
    VALIDATION_LABELS = "VALIDATION_LABELS"  # C: file, labels of an evaluation batch
    VALIDATION_FEATURES = "VALIDATION_FEATURES"  # C: file, the activations of an evaluation batch
    VALIDATION_RESULT = "VALIDATION_RESULT"  # S, C: samples, counts, loss of a batch or part
    VALIDATION_DONE = "VALIDATION_DONE"  # S: the round is over; its figures
    TRAINING_DONE = "TRAINING_DONE"  # S: the run is over; its figures
    REQUEST_INFERENCE = "REQUEST_INFERENCE"  # C: ask to use the trained segments; model, cuts
    INFERENCE_READY = "INFERENCE_READY"  # S: I hold what you lack; the run, its round
    INFERENCE_BATCH = "INFERENCE_BATCH"  # C: a batch of so many samples follows
    INFERENCE_FEATURES = "INFERENCE_FEATURES"  # C, S: file, the activations of a batch
    INFERENCE_OUTPUTS = "INFERENCE_OUTPUTS"  # S: file, the model's outputs for a batch
    UNREGISTER = "UNREGISTER"  # C: leave after TRAINING_DONE; with a reason, leave for now
    TRY_AGAIN = "TRY_AGAIN"  # S: this connection is closed, with the reason; connect again
    HEARTBEAT = "HEARTBEAT"  # C, S: still alive; at any time, and not counted
    INVALID_MESSAGE = "INVALID_MESSAGE"  # C, S: what you sent is refused, with the reason
    FAILED = "FAILED"  # C: my part cannot be computed, with the reason; a retry would fail too
    ABORT = "ABORT"  # C, S: I stop, with the reason
    END_RUN = "END_RUN"  # S: the run is over and cannot be resumed, with the reason


_TYPES: Final = {message_type.value: message_type for message_type in MessageType}
# Messages of these types always carry a file; others never do.
FILE_TYPES: Final = frozenset(
    {
        MessageType.SAMPLE_IDS,
        MessageType.TRAINING_LABELS,
        MessageType.TRAINING_FEATURES,
        MessageType.TRAINING_GRADS,
        MessageType.TRAINING_FIGURES,
        MessageType.SEND_MODEL,
        MessageType.SEND_AGGREGATED_MODEL,
        MessageType.VALIDATION_LABELS,
        MessageType.VALIDATION_FEATURES,
        MessageType.INFERENCE_FEATURES,
        MessageType.INFERENCE_OUTPUTS,
    }
)


@dataclass(slots=True)  # not frozen: that makes construction several times slower
class Message:
    """One message; ``payload`` holds the bytes of a file, or nothing.

    ``head_bytes``: size of head and JSON on the wire, of a received message; else 0. ``checksum``:
    the payload's, or "" if it is not computed yet.
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
        return File(self.payload, self.checksum)

    def get(self, name: str, kind: builtins.type[T]) -> T:
        """Return a field of the content, which must be a JSON object.

        Raises:
            ProtocolError: the field is missing or not of type ``kind``.
        """
        value = self.content.get(name) if isinstance(self.content, dict) else None
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            raise ProtocolError(f"{self.type} lacks {name!r}, of type {kind.__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts; files only with message types in ``payload_bytes``."""

    json_bytes: int = MAX_JSON_BYTES
    payload_bytes: Mapping[MessageType, int] = field(default_factory=dict)
    store: MakeStore = InMemory  # makes the buffer of a payload

    @property
    def largest_payload_bytes(self) -> int:
        return max(self.payload_bytes.values(), default=0)
