"""Who is there: clients register before the start, are lost in mid-run, and come back.

Before the start whoever fails or is refused frees its place, and the others go on waiting. Later a
client is away from when its connection is lost, or it made no progress for too long, until it has
registered again and its data are loaded. Who waits for it, and for how long, ``Patience`` says. A
client that was refused, or has failed, would fail again: only another process is of use.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from sfl.archive.run_folder import EventLog
from sfl.conversation.check import server_check
from sfl.conversation.join import (
    HERE,
    DataReport,
    Joined,
    Welcome,
    difference,
    outvoted,
    server_join,
)
from sfl.environment import differences
from sfl.errors import (
    PEER_ERRORS,
    ConnectionLost,
    NotYet,
    PeerFailed,
    ProtocolError,
    RunError,
    SflError,
    counted,
)
from sfl.runtime.places import Patience, Place, check_somebody_may_come, is_refusal
from sfl.runtime.resume import Past
from sfl.runtime.same_model import ServersModel
from sfl.strategy.recipe import Recipe
from sfl.transport.connection import Connection
from sfl.transport.switchboard import DrainedConnection, Switchboard
from sfl.wire.driver import Conversation, Gate, Network
from sfl.wire.link import ANY_ID, Link, last_words_for
from sfl.wire.messages import Message, MessageType

REGISTER_WITHIN_S = 10.0  # a connection that has not registered by then is closed
NOTICE_EVERY_S = 30.0  # to those who wait
GOODBYE_S = 10.0  # for whoever was lost when the run was over
LINGER_S = 60.0  # for whoever is there, and does not take its leave
SILENT_BEATS = 2  # that a client misses before another process may take its place
TICK_S = 0.5  # how often to look at the time


@dataclass(kw_only=True)
class Lobby(Network):
    """The clients of a run: who has registered, who is ready, who is away."""

    switchboard: Switchboard
    recipe: Recipe
    events: EventLog
    past: Past | None = None
    goes_on: bool = False  # clients may have folders of this run already
    fed: str = HERE
    patience: Patience = field(default_factory=Patience)
    model: ServersModel | None = None  # that clients must have built; None: any will do
    places: dict[int, Place] = field(default_factory=dict)
    # says why a client's report is refused; "" if it is not
    why_refused: Callable[[Joined], str] = lambda joined: ""
    # told of a client that is back, and its link is to be used from now on
    on_return: Callable[[Joined], None] = lambda joined: None

    def __post_init__(self) -> None:
        if self.past:
            self.ids, self.needed = frozenset(self.past.num_samples), self.past.clients
        else:  # more may register until so many are ready
            run = self.recipe.run
            self.ids, self.needed = frozenset(range(run.most_clients)), run.clients
        self._joining: dict[DrainedConnection, Conversation[Joined | None]] = {}
        self._changes: list[tuple[int, bool]] = []
        self._has_begun = self._ends = False
        self._round = -1
        self._looked_at = 0.0
        self._noticed_at = time.monotonic()

    # Before the start

    def gather(self) -> dict[int, Joined]:
        """Register clients until enough are there with their data: those of the past, if any.

        Whoever connects and is no client of the run is turned away, now and later, and the run goes
        on. Of a run that goes on, who does not come is waited for as in a round.
        """
        began_at = time.monotonic()
        while not self._agreed() and not self._goes_without(time.monotonic() - began_at):
            self._attend([], [])
        if self.past:
            for k in self.ids - self._ready():
                place = self.places.setdefault(k, Place(why="it did not come"))
                place.is_out = True
        else:
            self.places = {k: p for k, p in self.places.items() if p.is_here}
        self.ids = frozenset(self.places)
        self._has_begun = True
        self._changes.clear()
        joined = {k: place.joined for k, place in sorted(self.places.items())}
        return {k: client for k, client in joined.items() if client}

    def _agreed(self) -> bool:
        """Say whether enough clients are there whose data go together; refuse those that do not."""
        if not self.complete:
            return False
        for client, why in outvoted(self._reports()).items():
            self._lose(client, ProtocolError(why))
        model, places = self.model, list(self.places.values())
        if model is not None and self.complete:
            for joined in [p.joined for p in places if p.is_here and p.joined]:
                if why := model.unlike(joined, all_are_there=True):
                    self._lose(joined.client, ProtocolError(why))
        return self.complete

    def _reports(self) -> dict[int, DataReport]:
        """Return what the clients that are ready have said of their data."""
        places = sorted(self.places.items())
        return {k: place.joined.data for k, place in places if place.is_here and place.joined}

    @property
    def complete(self) -> bool:
        """Whether enough clients are ready, and nobody who registered is still loading."""
        return len(self._ready()) >= self.needed and self._ready() == self._taken()

    def _ready(self) -> set[int]:
        return {k for k, place in self.places.items() if place.is_here}

    def _taken(self) -> set[int]:
        return {k for k, place in self.places.items() if place.link}

    def _goes_without(self, waited_s: float) -> bool:
        """Say whether a run that goes on does so without those who have not come."""
        limit, enough = self.patience.skip_after_s, self.patience.min_clients
        return bool(self.past and limit and waited_s > limit and len(self._ready()) >= enough)

    @property
    def full(self) -> str:
        """Say that nobody else can join."""
        return f"the run {self.recipe.run.run} has its {counted(len(self.places), 'client')}"

    @property
    def missing(self) -> str:
        """Say who is not there yet, or any more."""
        ready = self._ready()
        if self._has_begun:
            away = {k: p for k, p in self.places.items() if not p.is_here and not p.is_out}
            names = ", ".join(
                f"{'a corrected ' if p.refused else ''}client_{k} ({p.why})"
                for k, p in sorted(away.items())
            )
            return f"waiting for {names}"
        any_will_do = len(self.ids) > self.needed
        ids = sorted((self._taken() if any_will_do else self.ids) - ready)
        count = max(self.needed - len(ready), len(self._taken()) - len(ready))
        names = f": {', '.join(map(str, ids))}" if ids else ""
        return f"waiting for {count} of {counted(self.needed, 'client')}{names}"

    # Registering, before the start and later

    def _take_id(self, wanted: int, instance: str, link: DrainedConnection) -> int:
        """Give a connection the id that it wants, or with ``ANY_ID`` the lowest free.

        Raises:
            RunError: it cannot be had.
            NotYet: it has been taken too often in a short time.
        """
        free = sorted(self.ids - self._taken())
        if wanted == ANY_ID:
            if not free:
                raise RunError(self.full)
            wanted = free[0]
        self._check_id(wanted)
        place = self.places.setdefault(wanted, Place())
        if place.link:
            # The same process has noticed before us that its connection is dead; of another one
            # we see so ourselves, or have heard nothing for too long.
            silent = place.link.silent_s() > SILENT_BEATS * self.switchboard.heartbeat_s
            if not (place.instance == instance or place.link.failed or silent):
                raise RunError(f"--client-id {wanted} is taken: another client of this run has it")
        if not (place.taken_over if place.link else place.taken).take():
            raise NotYet(f"client_{wanted} has connected anew too often: wait some seconds")
        if place.link:
            self._lose(wanted, ConnectionLost(f"client_{wanted} has connected anew"))
            self._changes.append((wanted, False))
        place.link, place.instance, place.ready = link, instance, False
        return wanted

    def _check_id(self, wanted: int) -> None:
        if wanted not in self.ids:
            every = sorted(self.ids)
            in_a_row = every == list(range(len(every)))
            known = f"0 to {every[-1]}" if in_a_row else ", ".join(map(str, every))
            raise RunError(f"--client-id {wanted}: this run has the ids {known}")

    def _find(self, wanted: int) -> tuple[int, str]:
        """Return which client somebody would be that only checks, and why not now.

        Raises:
            RunError: the run has no such client.
        """
        free = sorted(self.ids - self._taken())
        if wanted == ANY_ID:
            return (free[0], "") if free else (min(self.ids), self.full)
        self._check_id(wanted)
        return wanted, "" if wanted in free else f"client_{wanted} is connected"

    def _refuses(self, joined: Joined, before: Joined | None) -> str:
        """Say why a client that has loaded its data cannot take part; "" if it can."""
        if claim := self.why_refused(joined):
            return f"client_{joined.client} {claim}"
        if (why := self._unlike(joined, before)) or not self.model:
            return why
        return self.model.unlike(joined) or self.model.unfit(joined.data)

    def _answer_check(self, connection: DrainedConnection, hello: Message) -> Conversation[None]:
        """Answer a client that checks; it gets no place."""
        self.events.note(f"{connection.address} checks whether it could take part")

        def refuses(joined: Joined) -> str:
            place = self.places.get(joined.client)
            return self._refuses(joined, place.joined if place else None)

        return server_check(connection, hello, self._welcome(), self._find, refuses)

    def _register(self, connection: DrainedConnection) -> None:
        """Let one connection's registration go on with the message that has arrived."""
        if connection.failed and not connection.peer_name:  # it is gone already
            self._joining.pop(connection, None)
            why = connection.ending() or ConnectionLost("it is gone")
            self.switchboard.turned_away.add(connection.address, str(why), aloud=False)
            self.switchboard.drop(connection, str(why), last_words_for(why))
            return
        if connection not in self._joining:
            connection.name = "server"
            welcome = self._welcome()
            self._joining[connection] = server_join(
                connection,
                welcome,
                lambda wanted, who: self._take_id(wanted, who, connection),
                lambda hello: self._answer_check(connection, hello),
            )
            next(self._joining[connection])
        try:
            next(self._joining[connection])
            if connection.peer_name:
                self.events.say(f"{connection.peer_name} registered from {connection.address}")
        except StopIteration as end:
            del self._joining[connection]
            if end.value is None:
                self.switchboard.drop(connection, "", MessageType.UNREGISTER)
            else:
                self._is_ready(end.value, connection)
        except SflError as error:
            del self._joining[connection]
            if connection.peer_name:
                self._left(connection, error)
            else:
                self.switchboard.turned_away.add(connection.address, str(error))
                self.switchboard.drop(connection, str(error), last_words_for(error))

    def _welcome(self) -> Welcome:
        known = frozenset(k for k, place in self.places.items() if place.instance)
        return Welcome(
            ANY_ID, self.recipe.run, self.past.first_round if self.past else 0,
            goes_on=self.goes_on, fed=self.fed, known=known,
            heartbeat_s=self.switchboard.heartbeat_s,
        )  # fmt: skip

    def _is_ready(self, joined: Joined, connection: DrainedConnection) -> None:
        place = self.places[joined.client]
        if why := self._refuses(joined, place.joined):
            self._lose(joined.client, ProtocolError(why))
            return
        before = place.joined.fingerprint if place.joined else self._past_fingerprint(joined)
        for changed in differences(before, joined.fingerprint):
            self.events.say(
                f"warning: client_{joined.client} comes back with {changed} before: the last bit"
                " may differ"
            )
        place.joined, place.ready, place.is_out = joined, True, False
        place.refused = place.recurs = False
        connection.settled = True
        if self._has_begun:
            self.events.say(f"client_{joined.client} is back")
            self.on_return(joined)
            self._changes.append((joined.client, True))
            return
        shown = ", ".join(f"{count} {part}" for part, count in joined.data.num_samples.items())
        self.events.say(f"client_{joined.client} is ready: {shown} samples")
        self._compare(joined)
        if not self.complete:
            self.events.say(self.missing)
            self._notify()

    def _compare(self, joined: Joined) -> None:
        """Warn if a client's data do not go with another one's; who is wrong is seen later."""
        reports = self._reports()
        for other in reports:
            if why := difference(other, joined.client, reports):
                self.events.say(f"warning: {why}; when all are there, most decide")
                return

    def _past_fingerprint(self, joined: Joined) -> Mapping[str, str]:
        """Return what a client ran on before a run that goes on; else what it runs on."""
        known = self.past.client_fingerprints if self.past else {}
        return known.get(joined.client, joined.fingerprint)

    def _unlike(self, joined: Joined, before: Joined | None) -> str:
        """Say what is wrong with a client that should be the one that was here before."""
        past, begins = self.past, not self._has_begun
        digest = before.data.digest if before and self._has_begun else ""
        if past:
            digest = past.digests[joined.client]
        if past and begins and not past.may_have_own(joined.client, joined.data.rounds):
            return (
                f"client_{joined.client} lacks what only it has of round"
                f" {past.first_round - 1}: start it where it ran before, with the same --out"
            )
        if digest in ("", joined.data.digest):
            return ""
        return (
            f"client_{joined.client} has other data than it had in this run; give each client the"
            " --client-id and the --data-dir that it had"
        )

    def _left(self, connection: DrainedConnection, error: SflError) -> None:
        """Free the place of a client that could not be made ready."""
        client = self._client_of(connection)
        if client is not None:
            self._lose(client, error)
        else:
            self.switchboard.drop(connection, str(error))

    # In a round

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        return self._attend(links, gates)

    def _attend(self, links: Collection[Link], gates: Collection[Gate]) -> DrainedConnection | None:
        """Wait until something happens, and see to whoever is not in ``links``."""
        board = self.switchboard
        found: DrainedConnection | None = None
        others: list[DrainedConnection] = []

        def ready() -> bool:
            nonlocal found, others
            found = board.first(links)
            others = [c for c in board.news() if c not in links]
            return bool(found or others or any(g() for g in gates))

        board.until(ready, TICK_S)
        for connection in others:
            if connection not in board.connections:
                continue  # seen to with one before it
            client, why = self._client_of(connection), connection.ending()
            if client is None or not self.places[client].ready or why is None:
                self._register(connection)
            elif self._has_begun:
                self.lost(client, why)
                self._changes.append((client, False))
            else:
                self._left(connection, why)
        if time.monotonic() - self._looked_at > TICK_S:
            self._look_at_the_time(links)
        return None if self._changes else found

    def _client_of(self, connection: Connection) -> int | None:
        return next((k for k, place in self.places.items() if place.link is connection), None)

    def _look_at_the_time(self, links: Collection[Link]) -> None:
        """Turn away who does not register, drop who holds the round, say who is missing."""
        now = time.monotonic()
        elapsed_s, self._looked_at = now - self._looked_at, now
        for connection in self.switchboard.connections:
            if not connection.peer_name and connection.age_s() > REGISTER_WITHIN_S:
                self._joining.pop(connection, None)
                self.switchboard.turned_away.add(connection.address, "it did not register")
                reason = f"register within {REGISTER_WITHIN_S:g} seconds"
                self.switchboard.drop(connection, reason, MessageType.TRY_AGAIN)
        if self._has_begun:
            # Only time in which we wait counts: not that of our own arithmetic.
            self._see_who_holds_the_round(links, min(elapsed_s, 2 * TICK_S))
            if not self._ends:
                check_somebody_may_come(self.places.values())
        if time.monotonic() - self._noticed_at > NOTICE_EVERY_S:
            waits = any(not p.is_here and not p.is_out for p in self.places.values())
            if waits or not self._has_begun:
                if self._has_begun:
                    self.events.say(self.missing)
                self._notify()
            self._noticed_at = time.monotonic()

    def _see_who_holds_the_round(self, links: Collection[Link], elapsed_s: float) -> None:
        """Drop clients of whom the round waits for a message, and that make no progress."""
        limit = LINGER_S if self._ends else self.patience.skip_after_s
        for client, place in self.places.items():
            link, waits = place.link if place.ready else None, place.link in links
            step = place.step(self.recipe, self._round)
            place.clock.look(link, step, waits=waits, elapsed_s=elapsed_s)
            if limit and waits and place.clock.idle_s > limit:
                why = f"client_{client} made no progress for {place.clock.idle_s:.0f} seconds"
                self.lost(client, ConnectionLost(why))
                self._changes.append((client, False))

    def start_round(self, round_index: int) -> None:
        self._round = round_index
        for place in self.places.values():
            place.clock.start_round(place.link if place.ready else None)

    def is_here(self, client: int) -> bool:
        return self.places[client].is_here

    def is_out(self, client: int) -> bool:
        place = self.places[client]
        return place.is_out or place.out_in == self._round

    def lost(self, client: int, error: SflError) -> None:
        if not (self.patience.comes_back and isinstance(error, PEER_ERRORS)):
            raise error  # a full disk, say, is no fault of the client's
        self._lose(client, error)

    def _lose(self, client: int, error: SflError) -> None:
        """Let go of a client's connection, and tell the others whom we wait for."""
        place, refused = self.places[client], is_refusal(error)
        if place.link:
            self._joining.pop(place.link, None)
            self.switchboard.drop(place.link, str(error), last_words_for(error))
        place.free(error)
        free = "" if self._has_begun else "; its place is free"
        self.events.say(f"client_{client} is {'refused' if refused else 'away'}: {error}{free}")
        if not place.is_out:
            self._noticed_at = time.monotonic()
            self._notify()

    def take_changes(self) -> list[tuple[int, bool]]:
        changes, self._changes = self._changes, []
        return changes

    def gives_up(self, client: int) -> bool:
        place, limit = self.places[client], self.patience.skip_after_s
        waits = not place.refused and limit and place.clock.idle_s < limit
        if place.is_here or not limit or waits:
            return False
        place.is_out = len(self._ready()) >= self.patience.min_clients
        if place.is_out and place.refused:
            place.out_in = self._round
        return place.is_out

    def await_anybody(self) -> None:
        while not self._ready():
            self._attend([], [])

    def why_away(self, client: int) -> str:
        return self.places[client].why

    def end_soon(self) -> None:
        self.patience = Patience(self.patience.comes_back, GOODBYE_S, 0)
        self._ends, self._round = True, -1
        for place in self.places.values():
            place.out_in = -2

    def _notify(self) -> None:
        """Tell those who wait for whom they do; who is gone is noticed elsewhere."""
        for place in self.places.values():
            if place.is_here and place.link:
                try:
                    place.link.send_message_as_json(MessageType.MESSAGE, content=self.missing)
                except (ConnectionLost, PeerFailed):
                    continue
