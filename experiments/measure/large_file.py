"""How fast a large model file passes through send_file and receive_file, beside a bare socket.

python -m experiments.measure.large_file [--megabytes 500] [--times 5]

The file lies on disk at one end and is to lie there at the other: the bare copy reads a piece,
sends it, receives it and writes it, in turns with ours. Prints megabytes a second of each, and by
how much each process has grown; pages of a mapped file, which the system may drop, count as well.
"""

import mmap
import multiprocessing
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile

from sfl.files.checksum import checksum
from sfl.options import Parser
from sfl.program import run_program
from sfl.transport.connection import Connection
from sfl.wire.messages import Limits, MessageType
from sfl.wire.payload import payload_store_in

PIECE_BYTES = 2**18
TIMEOUT_S = 60.0
Copy = Callable[[socket.socket, Path], None]


def bare_send(sock: socket.socket, path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        piece = memoryview(bytearray(PIECE_BYTES))
        while num_bytes := file.readinto(piece):
            sock.sendall(piece[:num_bytes])


def bare_receive(sock: socket.socket, folder: Path) -> None:
    with TemporaryFile(dir=folder, buffering=0) as file:
        piece = memoryview(bytearray(PIECE_BYTES))
        while num_bytes := sock.recv_into(piece):
            file.write(piece[:num_bytes])


def send(sock: socket.socket, path: Path) -> None:
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # As SocketWeights.put has it: the checksum is the offer's, which comes before.
    of_file = path.with_suffix(".checksum").read_text()
    connection = Connection(sock, timeout_s=TIMEOUT_S, limits=Limits())
    connection.send_file(MessageType.SEND_MODEL, memoryview(data), checksum=of_file)


def receive(sock: socket.socket, folder: Path) -> None:
    limits = Limits(payload_bytes={MessageType.SEND_MODEL: 2**40}, store=payload_store_in(folder))
    connection = Connection(sock, timeout_s=TIMEOUT_S, limits=limits)
    connection.receive_file(MessageType.SEND_MODEL)


def _peak_kib() -> int:
    """Return how much of memory this process has had at most, pages of files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def _receiving(copy: Copy, folder: Path, pipe: Pipe) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname())
        sock, _ = listener.accept()
        before = _peak_kib()
        copy(sock, folder)
    pipe.send((time.perf_counter(), _peak_kib() - before))


def _sending(copy: Copy, path: Path, address: tuple[str, int], pipe: Pipe) -> None:
    with socket.create_connection(address) as sock:
        started, before = time.perf_counter(), _peak_kib()
        copy(sock, path)
    pipe.send((started, _peak_kib() - before))


def once(sender: Copy, receiver: Copy, path: Path) -> tuple[float, int, int]:
    """Copy a file from one process to another; return seconds, and KiB that each has grown by."""
    processes = multiprocessing.get_context("spawn")
    ends: list[Pipe] = []
    started = []
    for target, own in ((_receiving, (receiver, path.parent)), (_sending, (sender, path))):
        pipe, its_pipe = processes.Pipe()
        address = [ends[0].recv()] if ends else []
        started.append(processes.Process(target=target, args=(*own, *address, its_pipe)))
        started[-1].start()
        ends.append(pipe)
    (until, received_kib), (since, sent_kib) = (pipe.recv() for pipe in ends)
    for process in started:
        process.join()
    return until - since, sent_kib, received_kib


def main() -> None:
    options = parse()
    num_bytes = options.megabytes * 10**6
    ways = {"bare socket": (bare_send, bare_receive), "SFL": (send, receive)}
    found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in ways}
    with TemporaryDirectory(prefix="sfl-", dir=options.out or None) as folder:
        path = Path(folder) / "model.pt"
        path.write_bytes(data := os.urandom(10**6) * options.megabytes)
        path.with_suffix(".checksum").write_text(checksum(data))
        for _ in range(options.times):
            for name, way in ways.items():
                found[name].append(once(*way, path))
    print("| | MB a second | of the bare copy | sender grew, MiB | receiver grew, MiB |")
    print("| --- |" + " ---: |" * 4)
    for name, copies in found.items():
        share = median(b[0] / c[0] for b, c in zip(found["bare socket"], copies, strict=True))
        rate = num_bytes / median(c[0] for c in copies) / 1e6
        grew = [max(c[k] for c in copies) / 1024 for k in (1, 2)]
        print(f"| {name} | {rate:.0f} | {share:.2f} | {grew[0]:.0f} | {grew[1]:.0f} |")


def parse() -> Namespace:
    parser = Parser(
        prog="python -m experiments.measure.large_file", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--megabytes", type=int, default=500, help="of the file (default: 500)")
    parser.add_argument("--times", type=int, default=5, help="each way is tried (default: 5)")
    parser.add_argument("--out", default="", help="folder to copy in (default: the system's)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("large_file", main))
