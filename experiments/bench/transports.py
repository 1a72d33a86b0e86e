"""The commands that start our own server and clients, over each transport."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from experiments.bench.peers.mpi import launcher
from experiments.support.processes import free_port
from experiments.support.small_ca import SmallCA

Commands = list[list[str]]  # the server's first, or one that starts all


@dataclass(frozen=True)
class Plan:
    """What is started, over whichever transport."""

    clients: int
    server: Sequence[str]  # its options
    client: Sequence[str]  # options of each
    folder: Path  # for what a transport needs beside them


def over_sockets(transport: str, address: str, plan: Plan) -> Commands:
    """Return a command for each; clients that start before the server try again."""
    port = free_port()
    server = ["run_server.py", "--transport", transport, "--port", str(port), *plan.server]
    clients = [
        ["run_client.py", "--server", address.format(port=port, rank=k + 1, size=plan.clients + 1),
         "--client-id", str(k), *plan.client]
        for k in range(plan.clients)
    ]  # fmt: skip
    return [[sys.executable, *command] for command in (server, *clients)]


def under_tls(transport: str, address: str, plan: Plan) -> Commands:
    ca = SmallCA(plan.folder / "certificates")
    server, client = ca.issue("server"), ["--tls-ca", str(ca.cert)]
    own = replace(plan, server=[*plan.server, *server], client=[*plan.client, *client])
    return over_sockets(transport, address, own)


def under_mpirun(plan: Plan) -> Commands:
    own = [sys.executable, "-m", "mpi4py", "run_mpi.py"]
    return [[*launcher(plan.clients + 1), *own, *plan.server]]


TCP = partial(over_sockets, "tcp", "127.0.0.1:{port}")
# title -> the package that it needs, and its commands
TRANSPORTS: dict[str, tuple[str, Callable[[Plan], Commands]]] = {
    "SFL over ws": ("websockets", partial(over_sockets, "ws", "ws://127.0.0.1:{port}/")),
    "SFL over wss": ("websockets", partial(under_tls, "ws", "wss://127.0.0.1:{port}/")),
    "SFL over mpi": ("mpi4py", under_mpirun),
    "SFL over rpc": ("torch", partial(over_sockets, "rpc", "rpc://127.0.0.1:{port}/{rank}/{size}")),
}
