"""How the bench tells a client of a contender to take some steps, and hears how long they took."""

import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client

from torch import multiprocessing

from experiments.bench.peers.task import Task


def serve_blocks(address: str, client: int, step: Callable[[], int | None]) -> None:
    """Take as many steps as the bench asks for, time after time, until it asks for none.

    ``address`` is a socket in the file system. ``step`` takes one step of a client and returns how
    many bytes it sent and received, if it knows.
    """
    with Client(address, family="AF_UNIX") as bench:
        bench.send(client)
        while count := bench.recv():
            started, num_bytes = time.perf_counter(), 0
            for _ in range(count):
                num_bytes += step() or 0
            bench.send((time.perf_counter() - started, num_bytes))


def arguments() -> tuple[str, Sequence[str]]:
    """Return the bench's address and the options of the run, as they stand on the command line."""
    return sys.argv[1], sys.argv[2:]


def spawn_all(
    prog: str,
    run_server: Callable[[int, socket.socket, Sequence[str]], None],
    run_client: Callable[[int, int, str, Sequence[str]], None],
) -> None:
    """Run a server, given its listening socket, and the clients, given its port, till they end.

    Before these they are given their number, and behind them the run's options; a client the
    bench's address as well.
    """
    address, options = arguments()
    clients = Task(prog, options).run.clients
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        multiprocessing.spawn(run_server, (listener, options), join=False, daemon=True)
    multiprocessing.spawn(run_client, (port, address, options), nprocs=clients, daemon=True)
