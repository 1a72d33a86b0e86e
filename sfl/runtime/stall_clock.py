"""Measure how long a round has waited for a client without progress.

Progress is a message beyond all earlier ones of the round, or a later step, which a client that
trains alone names in its heartbeats. Heartbeats and reconnects alone are none: with them a client
could hold a round for ever. The clock stops while a client repeats its steps, and while a file
moves in either direction at ``LEAST_RATE``.
"""

from sfl.wire.members import Member

LEAST_RATE = 1000.0  # bytes a second: several times slower than a modem
BURST_S = 10.0  # longest stall that faster bytes before it make up for
Step = tuple[int, int]  # round, step
NO_STEP: Step = (-1, -1)


class StallClock:
    """The idle time of one client in a round, over all its connections."""

    def __init__(self) -> None:
        self._connection: Member | None = None
        self._before = 0  # messages of this connection before the round
        self.start_round(None)

    def start_round(self, connection: Member | None) -> None:
        """Reset the clock; ``connection`` is the client's, if it is connected."""
        self.idle_s = 0.0
        self._furthest = 0  # most messages of one connection in the round
        self._step = NO_STEP
        self._connect(connection, 0 if connection is None else connection.num_received)

    def _connect(self, connection: Member | None, before: int) -> None:
        self._connection, self._before, self._credit_s = connection, before, 0.0
        # Messages of the registration are no progress.
        self._num_received = 0 if connection is None else connection.num_received - before
        self._moved = 0 if connection is None else connection.bytes_moved

    def tick(self, connection: Member | None, step: Step, *, waits: bool, elapsed_s: float) -> None:
        """Advance the clock by ``elapsed_s`` for a client at ``step``; no connection: it is away.

        ``waits``: whether the round waits for its message.
        """
        if connection is None:
            self.idle_s += elapsed_s
            return
        if connection is not self._connection:
            self._connect(connection, 0)
        num_received, moved = connection.num_received - self._before, connection.bytes_moved
        has_progress, grown = num_received > self._num_received, moved - self._moved
        self._num_received, self._moved = num_received, moved
        if num_received > self._furthest or step > self._step:
            self.idle_s, self._credit_s = 0.0, 0.0
            self._furthest, self._step = max(num_received, self._furthest), max(step, self._step)
        elif waits and not has_progress:
            self._credit_s = min(self._credit_s + grown / LEAST_RATE, BURST_S) - elapsed_s
            self.idle_s += max(-self._credit_s, 0.0)
            self._credit_s = max(self._credit_s, 0.0)
