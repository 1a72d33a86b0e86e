"""WebSockets through an HTTP proxy: which is taken, what it is asked, and what its answers mean."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfl.errors import ConfigError, RunError
from sfl.nodes import ClientNode
from sfl.transport.addresses import parse_url
from sfl.transport.http_proxy import connect_through_proxy
from tests.support.launch import Launcher, wait_for

NAME = "server.invalid"  # known to the proxy alone


class Proxy:
    """Answers one request after another; with status 200 it connects to this machine's port."""

    def __init__(self, status: str) -> None:
        self._status = status
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            request = client.recv(65536).decode()
            self.requests.append(request)
            client.sendall(f"HTTP/1.1 {self._status}\r\nVia: x\r\n\r\n".encode())
            if not self._status.startswith("200"):
                client.close()
                continue
            port = int(request.split()[1].rpartition(":")[2])
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=_carry, args=(client, server), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _carry(client: socket.socket, server: socket.socket) -> None:
    with client, server:
        back = threading.Thread(target=_copy, args=(server, client))
        back.start()
        _copy(client, server)
        back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # either end may have gone
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Proxy]]:
    made: list[Proxy] = []

    def make(status: str) -> Proxy:
        made.append(Proxy(status))
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, made[-1].address)
        monkeypatch.delenv("no_proxy", raising=False)
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


def test_this_machine_and_what_no_proxy_names_need_none(
    proxy: Callable[[str], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy("200 OK")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert connect_through_proxy(parse_url(f"ws://{host}:9/"), 5) is None
    monkeypatch.setenv("no_proxy", "a.invalid,b.invalid")
    assert connect_through_proxy(parse_url("wss://b.invalid:9/"), 5) is None


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("503 Unavailable", ConnectionRefusedError),
        ("407 Proxy Authentication Required", RunError),
        ("403 Forbidden", RunError),
    ],
)
def test_a_proxy_that_refuses(
    proxy: Callable[[str], Proxy], status: str, error: type[Exception]
) -> None:
    asked = proxy(status)
    with pytest.raises(error, match=rf"the proxy at .* says HTTP/1\.1 {status}"):
        connect_through_proxy(parse_url(f"wss://{NAME}:9/"), 5)
    assert asked.requests[0].startswith(f"CONNECT {NAME}:9 HTTP/1.1\r\n")


@pytest.mark.parametrize("address", ["socks5://u:secret@h:9", "nothing", "http://h:abc"])
def test_an_address_that_is_no_proxy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", address)
    monkeypatch.setenv("http_proxy", address)
    with pytest.raises(ConfigError, match="none of the form") as caught:
        connect_through_proxy(parse_url(f"wss://{NAME}:9/"), 5)
    assert "secret" not in str(caught.value)


def test_a_client_checks_its_place_through_a_proxy(
    launcher: Launcher, proxy: Callable[[str], Proxy], tmp_path: Path
) -> None:
    from sfl.runtime.client_check import check

    server = launcher.server("--transport", "ws", "--clients", 1, "--model", "mlp")
    wait_for(server, "listening")
    asked = proxy("200 OK")
    address = f"ws://{NAME}:{launcher.port}/"
    assert check(ClientNode(server=address, client_id=0, out=str(tmp_path / "out"))) == 0
    assert asked.requests[0].startswith(f"CONNECT {NAME}:{launcher.port} ")
