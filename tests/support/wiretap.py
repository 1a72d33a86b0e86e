"""A run over sockets, with a proxy between clients and server that keeps what passes."""

from collections.abc import Sequence
from pathlib import Path

from tests.support.launch import Launcher
from tests.support.proxy import Proxy, Recorded


def record(
    folder: Path,
    num_clients: int,
    options: Sequence[object],
    client_options: Sequence[object] = (),
    transport: str = "tcp",
) -> tuple[Path, list[Recorded]]:
    """Run clients through a proxy; return the run's folder and what passed."""
    launcher = Launcher(folder, transport=transport)
    proxy = Proxy(launcher.port)
    server = launcher.server("--clients", num_clients, "--run", "r", *options)
    while "listening" not in server.out and server.process.is_alive():
        server.process.join(0.05)
    to_proxy = launcher.at(f"127.0.0.1:{proxy.port}")
    clients = [
        launcher.client(*to_proxy, "--client-id", k, *client_options) for k in range(num_clients)
    ]
    for program in [server, *clients]:
        program.ended_with(0)
    proxy.close()
    launcher.end()
    return launcher.folder / "server" / "r", proxy.connections
