"""Connections with waiting messages, in order of arrival."""

import heapq
import itertools
import weakref
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from sfl.errors import SflError


class Arriving(Protocol):
    """What ``Arrivals`` needs of a connection."""

    is_assigned: bool

    @property
    def arrived(self) -> bool: ...

    def arrival_ns(self) -> int: ...

    def end_reason(self) -> SflError | None: ...


C = TypeVar("C", bound=Arriving)


class Arrivals(Generic[C]):
    """Connections with a waiting message or a failure; guarded by ``SocketReader.lock``."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, C]] = []
        self._count = itertools.count()
        self._ready: dict[C, None] = {}
        self._forgotten: weakref.WeakSet[C] = weakref.WeakSet()

    def add(self, connection: C) -> None:
        """Record that a connection's first or last waiting message has changed."""
        if connection in self._forgotten:
            return
        heapq.heappush(self._heap, (connection.arrival_ns(), next(self._count), connection))
        if connection.end_reason() or not connection.is_assigned:
            self._ready[connection] = None

    def forget(self, connection: C) -> None:
        """Remove a connection, and ignore it from now on."""
        self._forgotten.add(connection)
        self._ready.pop(connection, None)
        self._heap = [entry for entry in self._heap if entry[2] is not connection]
        heapq.heapify(self._heap)

    def first_arrived(self, links: Collection[object]) -> C | None:
        """Return the one of ``links`` that has failed, or whose message has waited longest."""
        others, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            when, _, connection = entry
            if connection.arrived and connection.arrival_ns() == when:
                others.append(entry)
                found = connection if connection in links else None
        for entry in others:
            heapq.heappush(self._heap, entry)
        return found

    def ready_members(self) -> list[C]:
        """Return connections that have failed, and unassigned ones with a waiting message."""
        if not self._ready:
            return []
        self._ready = {
            c: None for c in self._ready if c.end_reason() or (c.arrived and not c.is_assigned)
        }
        return list(self._ready)
