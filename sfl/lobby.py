"""The server before the start: register clients until all are there with their data."""

import time
from collections.abc import Collection

from sfl.config import RunConfig, counted
from sfl.driver import Conversation
from sfl.errors import RunError, SflError
from sfl.link import Link
from sfl.protocol import MessageType
from sfl.registration import ANY_ID, HERE, Joined, Welcome, server_join
from sfl.resume import Past
from sfl.runfolder import EventLog
from sfl.switchboard import DrainedConnection, Switchboard

REGISTER_WITHIN_S = 10.0  # a connection that has not registered by then is closed
NOTICE_EVERY_S = 30.0  # to the clients that wait; well below any --peer-timeout


class Lobby:
    """The clients that have registered so far."""

    def __init__(self, run: RunConfig, ids: Collection[int], needed: int) -> None:
        self.run = run
        self.ids = frozenset(ids)  # that clients can have
        self.needed = needed  # clients; more may register until these are ready
        self.taken: set[int] = set()
        self.joined: dict[int, Joined] = {}

    def take_id(self, wanted: int) -> int:
        """Return the id for a client that wants ``wanted``, or ``ANY_ID`` for the lowest free.

        Raises:
            RunError: it cannot be had.
        """
        if self.taken == self.ids:
            raise RunError(self.full)
        if wanted == ANY_ID:
            wanted = min(self.ids - self.taken)
        if wanted not in self.ids:
            every = sorted(self.ids)
            in_a_row = every == list(range(len(every)))
            known = f"0 to {every[-1]}" if in_a_row else ", ".join(map(str, every))
            raise RunError(f"--client-id {wanted}: this run has the ids {known}")
        if wanted in self.taken:
            raise RunError(f"--client-id {wanted} is taken: another client of this run has it")
        self.taken.add(wanted)
        return wanted

    @property
    def full(self) -> str:
        """Say that nobody else can join."""
        return f"the run {self.run.run} has its {counted(len(self.taken), 'client')}"

    @property
    def complete(self) -> bool:
        """Whether enough clients are ready, and nobody who registered is still loading."""
        return len(self.joined) >= self.needed and self.taken == self.joined.keys()

    @property
    def missing(self) -> str:
        """Say who is not there yet."""
        any_will_do = len(self.ids) > self.needed
        ids = sorted((self.taken if any_will_do else self.ids) - self.joined.keys())
        count = max(self.needed - len(self.joined), len(self.taken) - len(self.joined))
        names = f": {', '.join(map(str, ids))}" if ids else ""
        return f"waiting for {count} of {counted(self.needed, 'client')}{names}"


def gather(
    switchboard: Switchboard,
    run: RunConfig,
    events: EventLog,
    past: Past | None,
    fed: str = HERE,
) -> dict[int, Joined]:
    """Register clients until enough are there with their data: those of the past, if there is one.

    Whoever connects and is no client of the run is turned away, now and later, and the run goes on.

    Raises:
        RunError: a client that had registered left again.
    """
    if past:
        lobby = Lobby(run, past.num_samples, past.clients)
    else:
        lobby = Lobby(run, range(run.most_clients), run.clients)
    first_round = past.first_round if past else 0
    welcome = Welcome(ANY_ID, run, first_round, past is not None, fed)
    conversations: dict[DrainedConnection, Conversation[Joined]] = {}
    noticed_at = time.monotonic()
    while not lobby.complete:
        for connection in switchboard.wait_for_any(timeout_s=1.0):
            if connection not in conversations:
                connection.name = "server"
                conversations[connection] = server_join(connection, welcome, lobby.take_id)
                next(conversations[connection])
            _resume(connection, conversations[connection], lobby, switchboard, events)
        now = time.monotonic()
        for connection in switchboard.connections:
            if not connection.peer_name and now - connection.accepted_at > REGISTER_WITHIN_S:
                events.note(f"turned away {connection.address}: it did not register")
                switchboard.drop(connection, f"register within {REGISTER_WITHIN_S:g} seconds")
        open_ones = set(switchboard.connections)
        conversations = {c: conversations[c] for c in conversations if c in open_ones}
        if now - noticed_at > NOTICE_EVERY_S:
            noticed_at = now
            _notify(lobby)
    switchboard.turn_away(lobby.full)
    for connection in switchboard.connections:
        if not connection.peer_name:
            switchboard.drop(connection, lobby.full)
    return dict(sorted(lobby.joined.items()))


def _resume(
    connection: DrainedConnection,
    conversation: Conversation[Joined],
    lobby: Lobby,
    switchboard: Switchboard,
    events: EventLog,
) -> None:
    """Let one connection's registration go on with the message that has arrived."""
    try:
        if any(joined.link is connection for joined in lobby.joined.values()):
            connection.receive_message_as_json()  # nothing is due from it: whatever came is wrong
        next(conversation)
        events.say(f"{connection.peer_name} registered from {connection.address}")
    except StopIteration as end:
        joined: Joined = end.value
        lobby.joined[joined.client] = joined
        counts = joined.data.num_samples
        shown = ", ".join(f"{count} {part}" for part, count in counts.items())
        events.say(f"{connection.peer_name} is ready: {shown} samples")
        if not lobby.complete:
            events.say(lobby.missing)
            _notify(lobby)
    except SflError as error:
        if connection.peer_name:
            raise _left(connection, error) from error
        events.note(f"turned away {connection.address}: {error}")
        switchboard.drop(connection, str(error))


def _notify(lobby: Lobby) -> None:
    for joined in lobby.joined.values():
        try:
            joined.link.send_message_as_json(MessageType.MESSAGE, content=lobby.missing)
        except SflError as error:
            raise _left(joined.link, error) from error


def _left(link: Link, error: SflError) -> RunError:
    return RunError(f"{link.peer_name} left before the start: {error}")
