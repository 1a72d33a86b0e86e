"""How long a round has waited for each client without progress.

Signs of life are no progress: a client that is only alive would hold a round for ever. Progress is
a message; a file that grows, in either direction, at ``LEAST_RATE``; or a later step, which a
client that trains alone names in its heartbeats.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sfl.link import Link
from sfl.transport import Connection

LEAST_RATE = 1000.0  # bytes a second: ten times less than a modem
Step = tuple[int, int]  # round, step


@dataclass(frozen=True)
class _Mark:
    """Where a client was when it last made progress."""

    since: float
    messages: int
    moved: int
    step: Step


class Waits:
    """The clients that a round waits for, each with the time of its last progress."""

    def __init__(self, step_of: Callable[[Connection], Step]) -> None:
        """``step_of`` returns the step that a client credibly says it is at."""
        self._step_of = step_of
        self._marks: dict[Connection, _Mark] = {}

    def look(self, links: Collection[Link], now: float) -> dict[Connection, float]:
        """Return for how many seconds each of ``links`` has kept us waiting; ask now and then."""
        connections = [link for link in links if isinstance(link, Connection)]
        self._marks = {c: self._mark(c, now) for c in connections}
        return {c: now - mark.since for c, mark in self._marks.items()}

    def _mark(self, connection: Connection, now: float) -> _Mark:
        messages, moved = connection.counters.messages_received, connection.bytes_moved
        mark, step = self._marks.get(connection), self._step_of(connection)
        if mark is not None:
            grown = moved - mark.moved
            grows = grown > 0 and grown >= LEAST_RATE * (now - mark.since)
            if messages == mark.messages and step <= mark.step and not grows:
                return mark
        return _Mark(now, messages, moved, step)
