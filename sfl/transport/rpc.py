"""Connections over torch.distributed.rpc, whose agents connect every process with every other.

Its maintainers have put the agent, TensorPipe, into maintenance; it is here to be compared with.
An agent unpickles what it is sent: use it among machines that trust each other. All processes join
before anything else happens, and none can come back.
"""

import atexit
import errno
import functools
import itertools
import os
import socket
import threading
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch.distributed.rpc as rpc
from torch.futures import Future

from sfl.errors import RunError
from sfl.transport.addresses import is_loopback, parse_address
from sfl.transport.tunnel import CHUNK, TunnelListener, Tunnels
from sfl.values import LinkShape
from sfl.wire.link import one_line

SERVER = "server"
LOOPBACK = "/sys/class/net/lo"  # Linux's
_JOIN_WITHIN_S = 600.0


class _RpcWay:
    """One connection's way to another process; a piece is answered when it has been taken."""

    def __init__(self, ours: str, peer: str, number: int) -> None:
        self._ours, self._peer, self._number = ours, peer, number
        self._leaving: Future[None] | None = None
        self._is_broken = False
        self.arrived: deque[tuple[bytes, Future[None]]] = deque()

    def put(self, data: bytes) -> None:
        arguments = self._ours, self._number, data
        self._leaving = rpc.rpc_async(self._peer, _arrive, args=arguments)

    def has_left(self) -> bool:
        if self._leaving is not None and self._leaving.done():
            try:
                self._leaving.value()
            except RuntimeError:  # the peer has gone
                self._is_broken = True
            self._leaving = None
        return self._leaving is None

    def take(self) -> bytes | None:
        if not self.arrived:
            if self._is_broken:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            return None
        data, answer = self.arrived.popleft()
        answer.set_result(None)
        if len(data) > CHUNK:
            raise ConnectionAbortedError(f"a piece of {len(data)} bytes")
        return data


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _arrive(sender: str, number: int, data: bytes) -> "Future[None]":
    """Take a piece that another process sends; called by this process's agent."""
    answer: Future[None] = Future()
    way = joined().way_of(sender, number)
    way.arrived.append((data, answer))
    return answer


def _interruptible(call: Callable[[], None]) -> Exception | None:
    """Run a call that takes no notice of Ctrl-C on a thread; return the error that it raised."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's own, about itself
                call()
        except (RuntimeError, OSError) as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="join", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    return errors[0] if errors else None


class Joined:
    """The processes that have joined, seen from one of them."""

    def __init__(self) -> None:
        self._name = ""
        self._ways: dict[tuple[str, int], _RpcWay] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._listener: TunnelListener | None = None
        self._tunnels = Tunnels()

    def join(self, name: str, rank: int, size: int, address: str) -> None:
        """Wait until all processes have joined; only the first call does anything.

        Raises:
            RunError: they have not, in time.
        """
        with self._lock:
            if self._name:
                return
            if is_loopback(parse_address(address)[0]) and Path(LOOPBACK).exists():
                # The agent would listen where this machine's name leads, for others as well.
                os.environ.setdefault("TP_SOCKET_IFNAME", Path(LOOPBACK).name)
            options = rpc.TensorPipeRpcBackendOptions(
                init_method=f"tcp://{address}", rpc_timeout=_JOIN_WITHIN_S
            )
            why = _interruptible(
                lambda: rpc.init_rpc(name, rank=rank, world_size=size, rpc_backend_options=options)  # type: ignore[no-untyped-call]
            )
            if why is not None:
                raise RunError(
                    f"not all {size} processes have joined at {address}: {one_line(str(why), 200)}"
                ) from why
            self._name = name

    def connect(self) -> socket.socket:
        """Return the socket of a new connection to the server."""
        number = next(self._numbers)
        return self._open(SERVER, number)

    def listen(self, shape: LinkShape, size: int, address: str) -> TunnelListener:
        """Return where the other processes' connections arrive, when all have joined.

        Raises:
            RunError: they have not, in time.
        """
        self._listener = TunnelListener("rpc://", shape)  # before any of them can connect
        self.join(SERVER, 0, size, address)
        return self._listener

    def way_of(self, peer: str, number: int) -> _RpcWay:
        """Return a connection's way; one that is new begins here, if this process listens."""
        with self._lock:
            if (peer, number) not in self._ways and self._listener is not None:
                self._listener.add(self._open(peer, number))
            return self._ways[peer, number]

    def _open(self, peer: str, number: int) -> socket.socket:
        way = self._ways[peer, number] = _RpcWay(self._name, peer, number)
        return self._tunnels.open(way, peer)

    def close(self) -> None:
        """Carry what is on its way, and leave the others."""
        self._tunnels.close()
        if self._name:
            rpc.shutdown(graceful=False)  # gracefully, it may wait for ever


@functools.cache
def joined() -> Joined:
    """Return this process's place among those that have joined."""
    place = Joined()
    atexit.register(place.close)
    return place
