"""How long a round has waited for a client without progress.

Signs of life are no progress, and neither is coming back: a client that does no more would hold a
round for ever. Progress is a message further than any before in the round; or a later step, which a
client that trains alone names in its heartbeats. While a client redoes its steps, or a file grows
at ``LEAST_RATE``, in either direction, the clock stands still.
"""

from sfl.wire.members import Member

LEAST_RATE = 1000.0  # bytes a second: several times less than a modem
BURST_S = 10.0  # for which a file that came faster may stall
Step = tuple[int, int]  # round, step
NO_STEP: Step = (-1, -1)


class Clock:
    """For how long a round has waited for one client, over all its connections."""

    def __init__(self) -> None:
        self._connection: Member | None = None
        self._before = 0  # messages of this connection before the round
        self.start_round(None)

    def start_round(self, connection: Member | None) -> None:
        """Begin anew; ``connection`` is the client's, if it is there."""
        self.idle_s = 0.0
        self._furthest = 0  # most messages of one connection in the round
        self._step = NO_STEP
        self._connect(connection, 0 if connection is None else connection.num_received)

    def _connect(self, connection: Member | None, before: int) -> None:
        self._connection, self._before, self._credit_s = connection, before, 0.0
        # To have come, and said what it is, is no going on.
        self._came = 0 if connection is None else connection.num_received - before
        self._moved = 0 if connection is None else connection.bytes_moved

    def look(self, connection: Member | None, step: Step, *, waits: bool, elapsed_s: float) -> None:
        """Let time pass for a client that is there, at a step that it names, or is not there.

        ``waits``: whether the round waits for its message.
        """
        if connection is None:
            self.idle_s += elapsed_s
            return
        if connection is not self._connection:
            self._connect(connection, 0)
        came, moved = connection.num_received - self._before, connection.bytes_moved
        goes_on, grown = came > self._came, moved - self._moved
        self._came, self._moved = came, moved
        if came > self._furthest or step > self._step:
            self.idle_s, self._credit_s = 0.0, 0.0
            self._furthest, self._step = max(came, self._furthest), max(step, self._step)
        elif waits and not goes_on:
            self._credit_s = min(self._credit_s + grown / LEAST_RATE, BURST_S) - elapsed_s
            self.idle_s += max(-self._credit_s, 0.0)
            self._credit_s = max(self._credit_s, 0.0)
