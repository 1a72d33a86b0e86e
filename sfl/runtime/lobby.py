"""Who is there: clients register before the start, are lost in mid-run, and come back.

Before the start whoever fails or is refused frees its place, and the others go on waiting. Later a
client is away from when its connection is lost, or it made no progress for too long, until it has
registered again and its data are loaded. Who waits for it, and for how long, ``Patience`` says. A
client that was refused, or has failed, would fail again: only another process is of use.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from sfl.archive.run_folder import EventLog
from sfl.conversation.check import server_check
from sfl.conversation.join import (
    HERE,
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
)
from sfl.runtime.admission import Admission
from sfl.runtime.client_places import Patience, Place, check_somebody_may_come, is_refusal
from sfl.runtime.roster import Roster
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import Conversation, Gate
from sfl.wire.link import ANY_ID, Link, last_words_for
from sfl.wire.members import Member, Members
from sfl.wire.messages import Message, MessageType

REGISTER_WITHIN_S = 10.0  # a connection that has not registered by then is closed
NOTICE_EVERY_S = 30.0  # to those who wait
GOODBYE_S = 10.0  # for whoever was lost when the run was over
LINGER_S = 60.0  # for whoever is there, and does not take its leave
SILENT_BEATS = 2  # that a client misses before another process may take its place
TICK_S = 0.5  # how often to look at the time


@dataclass(kw_only=True)
class Lobby:
    """The clients of a run: who has registered, who is ready, who is away."""

    members: Members
    recipe: Recipe
    events: EventLog
    goes_on: bool = False  # clients may have folders of this run already
    fed: str = HERE
    patience: Patience = field(default_factory=Patience)
    admission: Admission = field(default_factory=Admission)
    # told of a client that is back, and its link is to be used from now on
    on_return: Callable[[Joined], None] = lambda joined: None

    def __post_init__(self) -> None:
        past, run = self.admission.past, self.recipe.run
        if past:
            self.roster = Roster(run.run, frozenset(past.num_samples), past.clients)
        else:
            self.roster = Roster(run.run, frozenset(range(run.most_clients)), run.clients)
        self._joining: dict[Member, Conversation[Joined | None]] = {}
        self._changes: list[tuple[int, bool]] = []
        self._ends = False
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
        if self.admission.past:
            for k in self.roster.ids - self.roster.ready():
                place = self.roster.places.setdefault(k, Place(why="it did not come"))
                place.is_out = True
        else:
            self.roster.places = {k: p for k, p in self.roster.places.items() if p.is_here}
        self.roster.begin()
        self._changes.clear()
        joined = {k: place.joined for k, place in sorted(self.roster.places.items())}
        return {k: client for k, client in joined.items() if client}

    def _agreed(self) -> bool:
        """Say whether enough clients are there whose data go together; refuse those that do not."""
        if not self.roster.complete:
            return False
        for client, why in outvoted(self.roster.reports()).items():
            self._lose(client, ProtocolError(why))
        model, places = self.admission.model, list(self.roster.places.values())
        if model is not None and self.roster.complete:
            for joined in [p.joined for p in places if p.is_here and p.joined]:
                if why := model.unlike(joined, all_are_there=True):
                    self._lose(joined.client, ProtocolError(why))
        return self.roster.complete

    def _goes_without(self, waited_s: float) -> bool:
        """Say whether a run that goes on does so without those who have not come."""
        limit, enough = self.patience.skip_after_s, self.patience.min_clients
        return bool(
            self.admission.past
            and limit
            and waited_s > limit
            and len(self.roster.ready()) >= enough
        )

    # Registering, before the start and later

    def _take_id(self, wanted: int, instance: str, link: Member) -> int:
        """Give a connection the id that it wants, or with ``ANY_ID`` the lowest free.

        Raises:
            RunError: it cannot be had.
            NotYet: it has been taken too often in a short time.
        """
        free = sorted(self.roster.ids - self.roster.taken())
        if wanted == ANY_ID:
            if not free:
                raise RunError(self.roster.full)
            wanted = free[0]
        self.roster.check_id(wanted)
        place = self.roster.places.setdefault(wanted, Place())
        if place.link:
            # The same process has noticed before us that its connection is dead; of another one
            # we see so ourselves, or have heard nothing for too long.
            silent = place.link.silent_s() > SILENT_BEATS * self.members.heartbeat_s
            if not (place.instance == instance or place.link.end_reason() or silent):
                raise RunError(f"--client-id {wanted} is taken: another client of this run has it")
        if not (place.taken_over if place.link else place.taken).take():
            raise NotYet(f"client_{wanted} has connected anew too often: wait some seconds")
        if place.link:
            self._lose(wanted, ConnectionLost(f"client_{wanted} has connected anew"))
            self._changes.append((wanted, False))
        place.link, place.instance, place.ready = link, instance, False
        return wanted

    def _refuses(self, joined: Joined, place: Place | None) -> str:
        before = place.joined if place else None
        return self.admission.refuses(joined, before, has_begun=self.roster.has_begun)

    def _answer_check(self, connection: Member, hello: Message) -> Conversation[None]:
        """Answer a client that checks; it gets no place."""
        self.events.note(f"{connection.address} checks whether it could take part")

        def refuses(joined: Joined) -> str:
            place = self.roster.places.get(joined.client)
            return self._refuses(joined, place)

        return server_check(connection, hello, self._welcome(), self.roster.find, refuses)

    def _register(self, connection: Member) -> None:
        """Let one connection's registration go on with the message that has arrived."""
        if connection.end_reason() and not connection.peer_name:  # it is gone already
            self._joining.pop(connection, None)
            why = connection.end_reason() or ConnectionLost("it is gone")
            self.members.log_refusal(connection.address, str(why), on_console=False)
            self.members.drop(connection, str(why), last_words_for(why))
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
                self.members.drop(connection, "", MessageType.UNREGISTER)
            else:
                self._is_ready(end.value, connection)
        except SflError as error:
            del self._joining[connection]
            if connection.peer_name:
                self._left(connection, error)
            else:
                self.members.log_refusal(connection.address, str(error))
                self.members.drop(connection, str(error), last_words_for(error))

    def _welcome(self) -> Welcome:
        known = frozenset(k for k, place in self.roster.places.items() if place.instance)
        return Welcome(
            ANY_ID, self.recipe.run, self.admission.past.first_round if self.admission.past else 0,
            goes_on=self.goes_on, fed=self.fed, known=known,
            heartbeat_s=self.members.heartbeat_s,
        )  # fmt: skip

    def _is_ready(self, joined: Joined, connection: Member) -> None:
        place = self.roster.places[joined.client]
        if why := self._refuses(joined, place):
            self._lose(joined.client, ProtocolError(why))
            return
        before = (
            place.joined.fingerprint if place.joined else self.admission.past_fingerprint(joined)
        )
        for changed in differences(before, joined.fingerprint):
            self.events.say(
                f"warning: client_{joined.client} comes back with {changed} before: the last bit"
                " may differ"
            )
        place.joined, place.ready, place.is_out = joined, True, False
        place.refused = place.recurs = False
        connection.is_assigned = True
        if self.roster.has_begun:
            self.events.say(f"client_{joined.client} is back")
            self.on_return(joined)
            self._changes.append((joined.client, True))
            return
        shown = ", ".join(f"{count} {part}" for part, count in joined.data.num_samples.items())
        self.events.say(f"client_{joined.client} is ready: {shown} samples")
        self._compare(joined)
        if not self.roster.complete:
            self.events.say(self.roster.missing)
            self._notify()

    def _compare(self, joined: Joined) -> None:
        """Warn if a client's data do not go with another one's; who is wrong is seen later."""
        reports = self.roster.reports()
        for other in reports:
            if why := difference(other, joined.client, reports):
                self.events.say(f"warning: {why}; when all are there, most decide")
                return

    def _left(self, connection: Member, error: SflError) -> None:
        """Free the place of a client that could not be made ready."""
        client = self.roster.client_of(connection)
        if client is not None:
            self._lose(client, error)
        else:
            self.members.drop(connection, str(error))

    # In a round

    def wake(self) -> None:
        self.members.wake()

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        return self._attend(links, gates)

    def _attend(self, links: Collection[Link], gates: Collection[Gate]) -> Member | None:
        """Wait until something happens, and see to whoever is not in ``links``."""
        board = self.members
        found: Member | None = None
        others: list[Member] = []

        def ready() -> bool:
            nonlocal found, others
            found = board.first_arrived(links)
            others = [c for c in board.ready_members() if c not in links]
            return bool(found or others or any(g() for g in gates))

        board.wait_until(ready, TICK_S)
        for connection in others:
            if connection not in board.members:
                continue  # seen to with one before it
            client, why = self.roster.client_of(connection), connection.end_reason()
            if client is None or not self.roster.places[client].ready or why is None:
                self._register(connection)
            elif self.roster.has_begun:
                self.lost(client, why)
                self._changes.append((client, False))
            else:
                self._left(connection, why)
        if time.monotonic() - self._looked_at > TICK_S:
            self._look_at_the_time(links)
        return None if self._changes else found

    def _look_at_the_time(self, links: Collection[Link]) -> None:
        """Turn away who does not register, drop who holds the round, say who is missing."""
        now = time.monotonic()
        elapsed_s, self._looked_at = now - self._looked_at, now
        for connection in self.members.members:
            if not connection.peer_name and connection.age_s() > REGISTER_WITHIN_S:
                self._joining.pop(connection, None)
                self.members.log_refusal(connection.address, "it did not register")
                reason = f"register within {REGISTER_WITHIN_S:g} seconds"
                self.members.drop(connection, reason, MessageType.TRY_AGAIN)
        if self.roster.has_begun:
            # Only time in which we wait counts: not that of our own arithmetic.
            self._see_who_holds_the_round(links, min(elapsed_s, 2 * TICK_S))
            if not self._ends:
                check_somebody_may_come(self.roster.places.values())
        if time.monotonic() - self._noticed_at > NOTICE_EVERY_S:
            waits = any(not p.is_here and not p.is_out for p in self.roster.places.values())
            if waits or not self.roster.has_begun:
                if self.roster.has_begun:
                    self.events.say(self.roster.missing)
                self._notify()
            self._noticed_at = time.monotonic()

    def _see_who_holds_the_round(self, links: Collection[Link], elapsed_s: float) -> None:
        """Drop clients of whom the round waits for a message, and that make no progress."""
        limit = LINGER_S if self._ends else self.patience.skip_after_s
        for client, place in self.roster.places.items():
            link, waits = place.link if place.ready else None, place.link in links
            step = place.step(self.recipe, self._round)
            place.clock.look(link, step, waits=waits, elapsed_s=elapsed_s)
            if limit and waits and place.clock.idle_s > limit:
                why = f"client_{client} made no progress for {place.clock.idle_s:.0f} seconds"
                self.lost(client, ConnectionLost(why))
                self._changes.append((client, False))

    def start_round(self, round_index: int) -> None:
        self._round = round_index
        for place in self.roster.places.values():
            place.clock.start_round(place.link if place.ready else None)

    def is_here(self, client: int) -> bool:
        return self.roster.places[client].is_here

    def is_skipped(self, client: int) -> bool:
        place = self.roster.places[client]
        return place.is_out or place.out_in == self._round

    def lost(self, client: int, error: SflError) -> None:
        if not (self.patience.comes_back and isinstance(error, PEER_ERRORS)):
            raise error  # a full disk, say, is no fault of the client's
        self._lose(client, error)

    def _lose(self, client: int, error: SflError) -> None:
        """Let go of a client's connection, and tell the others whom we wait for."""
        place, refused = self.roster.places[client], is_refusal(error)
        if place.link:
            self._joining.pop(place.link, None)
            self.members.drop(place.link, str(error), last_words_for(error))
        place.free(error)
        free = "" if self.roster.has_begun else "; its place is free"
        self.events.say(f"client_{client} is {'refused' if refused else 'away'}: {error}{free}")
        if not place.is_out:
            self._noticed_at = time.monotonic()
            self._notify()

    def take_changes(self) -> list[tuple[int, bool]]:
        changes, self._changes = self._changes, []
        return changes

    def decide_skip(self, client: int) -> bool:
        place, limit = self.roster.places[client], self.patience.skip_after_s
        waits = not place.refused and limit and place.clock.idle_s < limit
        if place.is_here or not limit or waits:
            return False
        place.is_out = len(self.roster.ready()) >= self.patience.min_clients
        if place.is_out and place.refused:
            place.out_in = self._round
        return place.is_out

    def wait_for_client(self) -> None:
        while not self.roster.ready():
            self._attend([], [])

    def why_away(self, client: int) -> str:
        return self.roster.places[client].why

    def end_soon(self) -> None:
        self.patience = Patience(self.patience.comes_back, GOODBYE_S, 0)
        self._ends, self._round = True, -1
        for place in self.roster.places.values():
            place.out_in = -2

    def _notify(self) -> None:
        """Tell those who wait for whom they do; who is gone is noticed elsewhere."""
        for place in self.roster.places.values():
            if place.is_here and place.link:
                try:
                    place.link.send_message_as_json(
                        MessageType.MESSAGE, content=self.roster.missing
                    )
                except (ConnectionLost, PeerFailed):
                    continue
