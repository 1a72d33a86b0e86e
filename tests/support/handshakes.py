"""What strangers and clients say to a guarded port before anybody is known."""

import contextlib
import socket
from pathlib import Path

from sfl.transport.connection import Connection
from sfl.transport.tokens import write_tokens
from sfl.wire.framing import encode_head
from sfl.wire.messages import Limits, Message, MessageType

FAST = ["--model", "mlp", "--batch-size", 200, "--rounds", 1]
HELLO = {"role": "client", "client_id": 0, "nonce": "0" * 64}
TOKEN, OTHER = "t" * 40, "o" * 40


def token_file(folder: Path, *lines: str, name: str = "token") -> Path:
    path = folder / name
    write_tokens(path, list(lines))
    return path


def answers(port: int, *frames: bytes) -> list[Message]:
    """Send frames to a server and return what it says until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        for frame in frames:
            sock.sendall(frame)
        connection = Connection(sock, timeout_s=20, limits=Limits())
        said = []
        with contextlib.suppress(Exception):
            while True:
                said.append(connection._next())
        return said


def frame(kind: MessageType, content: object = "") -> bytes:
    return encode_head(Message(kind, content=content))


def refusal(port: int, *frames: bytes) -> str:
    last = answers(port, *frames)[-1]
    assert last.type is MessageType.INVALID_MESSAGE
    return last.content
