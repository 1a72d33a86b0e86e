"""Connections between the processes that ``mpirun`` has started: rank 0 is the server.

Bytes travel by MPI's own buffers; nothing that arrives is unpickled. MPI waits for a message by
using a whole core, so one thread of each process looks for messages instead (``tunnel``).
"""

import atexit
import functools
import itertools
import socket

from mpi4py import MPI

from sfl.transport.tunnel import CHUNK, TunnelListener, Tunnels
from sfl.values import LinkShape

SERVER = 0  # its rank
_OPEN = 0  # tag of a message that opens a connection; its content is the connection's own tag
_TAG_BYTES = 4


class _MpiWay:
    """One connection's way to another rank."""

    def __init__(self, comm: MPI.Intracomm, rank: int, tag: int, *, is_new: bool) -> None:
        """``is_new``: the other rank does not know of this connection yet."""
        self._comm, self._rank, self._tag = comm, rank, tag
        self._leaving: tuple[MPI.Request, bytes] | None = None
        self._is_new = is_new

    def put(self, data: bytes) -> None:
        request = self._comm.Isend([data, MPI.BYTE], self._rank, self._tag)
        self._leaving = request, data

    def has_left(self) -> bool:
        if self._is_new:
            opening, self._is_new = self._tag.to_bytes(_TAG_BYTES), False
            self._leaving = self._comm.Isend([opening, MPI.BYTE], self._rank, _OPEN), opening
        if self._leaving and self._leaving[0].Test():
            self._leaving = None
        return self._leaving is None

    def take(self) -> bytes | None:
        found = _take(self._comm, self._rank, self._tag, CHUNK)
        return found[1] if found else None


def _take(comm: MPI.Intracomm, rank: int, tag: int, most: int) -> tuple[int, bytes] | None:
    """Return a message and its sender's rank; None: there is none."""
    status = MPI.Status()
    message = comm.Improbe(rank, tag, status)
    if message is None:
        return None
    if (size := status.Get_count(MPI.BYTE)) > most:
        raise ConnectionAbortedError(f"a piece of {size} bytes")
    data = bytearray(size)
    message.Recv([data, MPI.BYTE])
    return status.Get_source(), bytes(data)


class World:
    """The processes that MPI has started together, seen from one of them."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.is_one_machine = self.comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == self.size
        self._tags = itertools.count(1)
        self._listener: TunnelListener | None = None
        self._tunnels = Tunnels(self._look)

    def connect(self) -> socket.socket:
        """Return the socket of a new connection to the server."""
        way = _MpiWay(self.comm, SERVER, next(self._tags), is_new=True)
        return self._tunnels.open(way, f"rank {SERVER}")

    def listen(self, shape: LinkShape) -> TunnelListener:
        """Return where the other ranks' connections arrive."""
        self._listener = TunnelListener("mpi://", shape)
        return self._listener

    def _look(self) -> bool:
        """Take a new connection, if there is one and this process listens."""
        if self._listener is None:
            return False
        if (found := _take(self.comm, MPI.ANY_SOURCE, _OPEN, _TAG_BYTES)) is None:
            return False
        rank, opening = found
        way = _MpiWay(self.comm, rank, int.from_bytes(opening), is_new=False)
        self._listener.add(self._tunnels.open(way, f"rank {rank}"))
        return True

    def close(self) -> None:
        """Carry what is on its way, and stop; MPI itself ends with the process."""
        self._tunnels.close()


@functools.cache
def world() -> World:
    """Return this process's place among those that MPI has started."""
    place = World()
    atexit.register(place.close)  # before MPI's own end, which is registered earlier
    return place
