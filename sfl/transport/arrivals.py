"""Which connections have something to be taken, in the order in which it came."""

import heapq
import itertools
import weakref
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from sfl.errors import SflError


class Arriving(Protocol):
    """A connection as ``Arrivals`` sees it."""

    settled: bool

    @property
    def arrived(self) -> bool: ...

    def arrival_ns(self) -> int: ...

    def ending(self) -> SflError | None: ...


C = TypeVar("C", bound=Arriving)


class Arrivals(Generic[C]):
    """The connections of which something has arrived; guarded by ``SocketReader.lock``."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, C]] = []
        self._count = itertools.count()
        self._news: dict[C, None] = {}
        self._forgotten: weakref.WeakSet[C] = weakref.WeakSet()

    def add(self, connection: C) -> None:
        """Take note that something new stands first, or last, in what waits of a connection."""
        if connection in self._forgotten:
            return
        heapq.heappush(self._heap, (connection.arrival_ns(), next(self._count), connection))
        if connection.ending() or not connection.settled:
            self._news[connection] = None

    def forget(self, connection: C) -> None:
        """Take no more note of a connection."""
        self._forgotten.add(connection)
        self._news.pop(connection, None)
        self._heap = [entry for entry in self._heap if entry[2] is not connection]
        heapq.heapify(self._heap)

    def first(self, links: Collection[object]) -> C | None:
        """Return the link whose message has waited longest, or that has failed."""
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

    def news(self) -> list[C]:
        """Return those that have failed, and those not yet settled of which something waits."""
        if not self._news:
            return []
        self._news = {c: None for c in self._news if c.ending() or (c.arrived and not c.settled)}
        return list(self._news)
