"""A TCP proxy that keeps what passes, in both directions, and decodes it into messages."""

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

from sfl.wire.framing import Decoder
from sfl.wire.messages import FILE_TYPES, Limits, Message

UP, DOWN = "up", "down"


@dataclass
class Recorded:
    """One connection: SFL's bytes each way, and the messages in the order they were complete."""

    num_raw: int = 0  # bytes both ways, with those of a WebSocket
    streams: dict[str, bytearray] = field(
        default_factory=lambda: {UP: bytearray(), DOWN: bytearray()}
    )
    messages: list[tuple[str, Message]] = field(default_factory=list)


class Unwrapped:
    """SFL's bytes in a stream that may be a WebSocket's, in one direction."""

    def __init__(self, way: str) -> None:
        self._way, self._head = way, b""
        self._frames: Any = None  # a WebSocket's, behind its request or the answer to it
        self._is_websocket: bool | None = None  # None: nothing has come yet

    def take(self, data: bytes) -> bytes:
        if self._is_websocket is None:
            self._is_websocket = data.startswith((b"GET ", b"HTTP/"))
        if not self._is_websocket:
            return data
        if self._frames is None:
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return b""
            from websockets.protocol import CLIENT, SERVER, Protocol

            self._frames = Protocol(SERVER if self._way == UP else CLIENT)
        self._frames.receive_data(data)
        return b"".join(f.data for f in self._frames.events_received() if f.opcode in (0, 2))


class Proxy:
    """Listens on ``port`` and passes every connection on to ``target_port``."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections: list[Recorded] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._start(self._accept)

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._sockets += [client, server]
            recorded = Recorded()
            self.connections.append(recorded)
            self._start(self._pass, client, server, recorded, UP)
            self._start(self._pass, server, client, recorded, DOWN)

    def _pass(
        self, source: socket.socket, target: socket.socket, recorded: Recorded, way: str
    ) -> None:
        decoder = Decoder(Limits(payload_bytes=dict.fromkeys(FILE_TYPES, 2**30)))
        inside = Unwrapped(way)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._lock:  # decoded before it is passed on: an answer comes after it
                    recorded.num_raw += len(data)
                    plain = inside.take(data)
                    recorded.streams[way] += plain
                    self._decode(decoder, plain, recorded, way)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _decode(self, decoder: Decoder, data: bytes, recorded: Recorded, way: str) -> None:
        for message in decoder.messages_of(data):
            recorded.messages.append((way, message))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets:
            sock.close()
