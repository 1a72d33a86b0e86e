"""A site for browsers in a program of its own, and what a test says to it."""

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sfl
from experiments.hostile.target import Target
from experiments.hostile.upgrades import heard_from, sent, told
from tests.support.launch import Launcher, Program, wait_for

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


@dataclass
class Served:
    """A site that runs, and what it was started with."""

    launcher: Launcher
    program: Program
    run: sfl.Run

    @property
    def port(self) -> int:
        return self.launcher.port

    @property
    def is_tls(self) -> bool:
        return self.launcher.transport == "wss"

    def ask(self, path: str, *, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """Return the response to one request, read to its end as ``.content``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if self.is_tls:
            trust = ssl.create_default_context(cafile=str(self.launcher.folder / "ca.pem"))
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=trust)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        response = connection.getresponse()
        response.content = response.read()
        connection.close()
        return response

    def target(self) -> Target:
        return Target("127.0.0.1", self.port, tls=self.is_tls)

    def request(self, path: str = "/predict", *more: str, host: str = "") -> bytes:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}"]
        lines += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", *more]
        return "\r\n".join([*lines, f"Sec-WebSocket-Key: {KEY}", "", ""]).encode()

    def answers(self, request: bytes, frames: Iterable[bytes] = ()) -> str:
        """Send a request, then frames; return in words what the site says until it closes."""
        with self.target().connect() as stream:
            sent(stream, [request])
            first = memoryview(bytearray(2**16))
            answer = bytes(first[: stream.receive_into(first)])
            sent(stream, frames)
            return told(answer + heard_from(stream))


@contextlib.contextmanager
def serving(folder: Path, run: sfl.Run, *options: object, tls: bool = False) -> Iterator[Served]:
    launcher = Launcher(folder, transport="wss" if tls else "ws")
    own = launcher._certificates if tls else None
    with_tls = [*own.issue("site"), "--name", "localhost"] if own else []
    program = launcher.web(run.path, "--no-decoder", *with_tls, *options)
    try:
        if own:
            _ = own.trust
        wait_for(program, "in a browser")
        yield Served(launcher, program, run)
        assert "Traceback" not in program.out + program.err
    finally:
        launcher.end()


def silent(served: Served, count: int, data: bytes) -> list[socket.socket]:
    """Open connections that say something and wait."""
    sockets = []
    for _ in range(count):
        sockets.append(socket.create_connection(("127.0.0.1", served.port), timeout=30))
        sockets[-1].sendall(data)
    return sockets
