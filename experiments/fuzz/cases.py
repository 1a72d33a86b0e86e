"""What is thrown at each reader, and what it makes of it: frames, files, JSON and handshakes."""

import itertools
import random
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from experiments.hostile.files import hostile_files
from sfl.errors import AuthError, ConnectionLost, Damaged, IntegrityError, ProtocolError
from sfl.files import strict_json
from sfl.files.torch_file import TensorSpec, decode, decode_state, encode, encode_state, state_spec
from sfl.transport.guard import Guard
from sfl.transport.pending import PendingConnection
from sfl.transport.tokens import Tokens
from sfl.values import Position
from sfl.wire.framing import Decoder, encode_head
from sfl.wire.messages import FILE_TYPES, Limits, Message, MessageType

MAX_FRAME_BYTES = 64 * 2**10  # of a payload that the decoder accepts
TOKEN = "t" * 43


def frames() -> list[bytes]:
    """Return a valid frame of every type of message."""
    found, flat = [], {"loss": 1.5, "correct": 3}
    contents = ("", flat, flat | {"names": ["a", "b"], "nested": [[{"x": None}]]})
    for kind, content in itertools.product(MessageType, contents):
        payload = bytes(range(200)) if kind in FILE_TYPES else b""
        message = Message(kind, "client_0", "server", content, Position("run", 1, 2, 0), payload)
        found.append(encode_head(message) + payload)
    return found


def decode_frames(data: bytes) -> str:
    """Feed bytes to a decoder, in pieces; return what came of it."""
    decoder = Decoder(Limits(payload_bytes=dict.fromkeys(FILE_TYPES, MAX_FRAME_BYTES)))
    rest, whole = memoryview(data), 0
    while rest:
        with decoder.get_buffer() as buffer:
            taken = min(len(buffer), len(rest), 97)
            buffer[:taken] = rest[:taken]
        decoder.advance(taken)
        rest = rest[taken:]
        while decoder.next_message() is not None:
            whole += 1
    return f"{whole} whole messages"


def decode_flipped(data: bytes) -> str:
    """Feed a frame with a flipped bit to a decoder."""
    try:
        outcome = decode_frames(data)
    except Damaged:
        return "Damaged"
    raise AssertionError(f"a flipped bit gives {outcome}")


def files() -> list[bytes]:
    """Return valid files of tensors and of dicts of tensors, and some of bad will."""
    tensors = [
        torch.zeros(3, 4),
        torch.arange(7),
        torch.ones(1),
        torch.zeros(0),
        torch.eye(9).half(),
    ]
    state = torch.nn.BatchNorm1d(3).state_dict()
    bad = [data for data, _ in hostile_files().values() if 0 < len(data) < 4096]
    # Valid ones more often: what is close to right goes deeper.
    return [*(encode(t) for t in tensors), encode_state(state)] * 8 + bad


def load_file(data: bytes) -> str:
    """Load bytes as a tensor and as a state; return what came of it."""
    for tensor in (torch.zeros(3, 4), torch.arange(7), torch.eye(9).half()):
        try:
            decode(data, TensorSpec.of(tensor), "file")
            return "a tensor as expected"
        except IntegrityError as error:
            last = error
    try:
        decode_state(data, state_spec(torch.nn.BatchNorm1d(3).state_dict()), "file")
        return "a state as expected"
    except IntegrityError:
        raise last from None


def texts() -> list[bytes]:
    """Return JSON of what a reader stumbles over: quotes, backslashes, brackets, long ones too."""
    words = [b'"', b"\\", b'\\"', b"[", b"]", b"{", b"}", b",", b":", b'"a":', b"1e999", b"9" * 30,
             b"\\ud800", b"\xff", b"NaN", b"\n", b"\0"]  # fmt: skip
    short = [b"".join(random.Random(n).choices(words, k=60)) for n in range(200)]
    return [*short, *(word * (60_000 // len(word)) for word in words), b"[" * 20 + b'\\"' * 30_000]


def read_text(data: bytes) -> str:
    """Read bytes as JSON; return what came of it."""
    try:
        value = strict_json.loads(data)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    return f"a {type(value).__name__}"


def handshakes() -> list[bytes]:
    """Return what a client says before it is let in: AUTHENTICATE, a proof, REGISTER."""
    hello = {"role": "client", "client_id": 0, "nonce": "0" * 64}
    said = {MessageType.AUTHENTICATE: hello, MessageType.PROOF: {"proof": "0" * 64}}
    frames = [encode_head(Message(kind, content=content)) for kind, content in said.items()]
    return [b"".join(frames), *frames, encode_head(Message(MessageType.REGISTER, content=hello))]


def shake_hands(data: bytes) -> str:
    """Say bytes at the door of a server that has a token; return what came of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        visitor = PendingConnection(ours, Guard(tokens=Tokens(Path("token"), TOKEN)))
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            let_in = visitor.process()
        except (AuthError, ConnectionLost) as error:
            raise ProtocolError(str(error)) from error
    if let_in:
        raise AssertionError("let in without a proof")
    return "waits"


CASES: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes], str]]] = {
    "frames": (frames, decode_frames),
    "flips": (frames, decode_flipped),
    "files": (files, load_file),
    "texts": (texts, read_text),
    "handshakes": (handshakes, shake_hands),
}
