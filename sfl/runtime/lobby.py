"""Register clients before the start; track lost and returning clients during the run.

Before the start a client that fails or is refused frees its place, and the others keep waiting.
During the run a client is away from the loss of its connection, or a stall, until it has registered
again and its data are loaded; ``Patience`` says how long rounds wait for it. A client that was
refused or has failed needs a corrected process.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sfl.archive.run_folder import EventLog
from sfl.conversation.check import server_check
from sfl.conversation.join import HERE, Joined, Welcome, server_join
from sfl.conversation.report import data_difference, disagreeing_clients
from sfl.environment import differences
from sfl.errors import (
    PEER_ERRORS,
    ConnectionLost,
    NotYet,
    ProtocolError,
    RunError,
    SflError,
)
from sfl.model.topology import passing_links
from sfl.runtime.admission import Admission
from sfl.runtime.client_places import Patience, Place, check_any_can_return, is_refusal
from sfl.runtime.roster import Roster
from sfl.runtime.share import Share
from sfl.runtime.waiting_notice import WaitingNotice
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import Conversation, Gate
from sfl.wire.link import ANY_ID, Link, last_words_for
from sfl.wire.members import Member, Members
from sfl.wire.messages import Message, MessageType

REGISTER_WITHIN_S = 10.0  # a connection that has not registered by then is closed
GOODBYE_S = 10.0  # wait after the run for clients that are away
LINGER_S = 60.0  # wait after the run for connected clients that do not unregister
MISSED_HEARTBEATS = 2  # after which another process may take a client's place
POLL_S = 0.5  # interval of checking timeouts


@dataclass(kw_only=True)
class Lobby:
    """The ``Network`` of a server: its clients over all their connections."""

    members: Members
    recipe: Recipe
    events: EventLog
    resumed: bool = False  # clients may already have folders of this run
    fed: str = HERE
    task_servers: Mapping[str, str] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    admission: Admission = field(default_factory=Admission)
    share: Share = field(default_factory=Share)
    secret: bytes = b""  # that hops do not have, see ``wire.seal``
    # called with a returned client, whose new link replaces the old one
    on_return: Callable[[Joined], None] = lambda joined: None

    def __post_init__(self) -> None:
        past, run, ours = self.admission.past, self.recipe.run, self.share.ours
        self._all_ids = sorted(past.num_samples) if past else range(run.most_clients)
        needed = len(ours(self._all_ids if past else range(run.clients)))
        of_run = self._all_ids if self.share.size > 1 else ()
        self.roster = Roster(run.run, frozenset(ours(self._all_ids)), needed, of_run=of_run)
        self._joining: dict[Member, Conversation[Joined | None]] = {}
        self._changes: list[tuple[int, bool]] = []
        self._is_ending = False
        self._round = -1
        self._checked_at = 0.0
        self.notice = WaitingNotice(self.events)

    # Before the start

    def gather(self) -> dict[int, Joined]:
        """Register clients until enough are ready; in a resumed run, the clients it had.

        Refused connections do not end the run. A resumed run waits for its missing clients as a
        round does.
        """
        began_at = time.monotonic()
        with self.notice:
            while not self._may_begin() and not self._skips_absent(time.monotonic() - began_at):
                self._wait_and_handle([], [])
        if self.admission.past:
            for k in self.roster.ids - self.roster.ready():
                place = self.roster.places.setdefault(k, Place(why="it did not come"))
                place.is_skipped = True
        else:
            self.roster.places = {k: p for k, p in self.roster.places.items() if p.is_here}
        self.roster.begin()
        self._changes.clear()
        joined = {k: place.joined for k, place in sorted(self.roster.places.items())}
        return {k: client for k, client in joined.items() if client}

    def _may_begin(self) -> bool:
        """Return whether enough compatible clients are ready; refuse incompatible ones."""
        if not self.roster.complete:
            return False
        for client, why in disagreeing_clients(self.roster.reports(), self.recipe).items():
            self._disconnect(client, ProtocolError(why))
        model, places = self.admission.model, list(self.roster.places.values())
        if model is not None and self.roster.complete:
            for joined in [p.joined for p in places if p.is_here and p.joined]:
                if why := model.why_different(joined, all_are_there=True):
                    self._disconnect(joined.client, ProtocolError(why))
        return self.roster.complete

    def _skips_absent(self, waited_s: float) -> bool:
        """Return whether a resumed run starts without the clients that have not come back."""
        limit, enough = self.patience.skip_after_s, self.patience.min_clients
        ready = self.roster.ready()
        has_needed = all(k in ready or self.recipe.may_leave(k) for k in self.roster.ids)
        return bool(
            self.admission.past
            and not self.recipe.aligns  # by the ids of all clients
            and limit
            and waited_s > limit
            and len(ready) >= enough
            and has_needed
        )

    # Registering, before the start and later

    def _take_id(self, wanted: int, instance: str, link: Member) -> int:
        """Assign a connection the id that it asks for, or with ``ANY_ID`` the lowest free one.

        Raises:
            RunError: the id does not exist or is taken.
            NotYet: it was assigned too often in a short time.
        """
        free = sorted(self.roster.ids - self.roster.taken())
        if wanted == ANY_ID:
            if not free:
                raise RunError(self.roster.full_message)
            wanted = free[0]
        self.roster.check_id(wanted)
        place = self.roster.places.setdefault(wanted, Place())
        if place.link:
            # The same process may know before us that its connection is dead. Another process gets
            # the id only if we have noticed that ourselves, or heartbeats are missing.
            silent = place.link.silent_s() > MISSED_HEARTBEATS * self.members.heartbeat_s
            if not (place.instance == instance or place.link.end_reason() or silent):
                raise RunError(f"--client-id {wanted} is taken: another client of this run has it")
        if not (place.takeovers if place.link else place.taken).take():
            raise NotYet(f"client_{wanted} has connected anew too often: wait some seconds")
        if place.link:
            self._disconnect(wanted, ConnectionLost(f"client_{wanted} has connected anew"))
            self._changes.append((wanted, False))
        place.link, place.instance, place.ready = link, instance, False
        return wanted

    def _elsewhere(self, wanted: int) -> Mapping[str, Any] | None:
        """Return where a client goes that another rank serves, see ``Share.elsewhere``."""
        is_full = not self.roster.ids - self.roster.taken()
        return self.share.elsewhere(wanted, self._all_ids, is_full=is_full)

    def _why_refused(self, joined: Joined, place: Place | None) -> str:
        before = place.joined if place else None
        return self.admission.why_refused(joined, before, has_begun=self.roster.has_begun)

    def _answer_check(self, connection: Member, hello: Message) -> Conversation[None]:
        """Answer a client that checks, without registering it."""
        self.events.note(f"{connection.address} checks whether it could take part")

        def why_refused(joined: Joined) -> str:
            place = self.roster.places.get(joined.client)
            return self._why_refused(joined, place)

        return server_check(
            connection, hello, self._welcome(), self.roster.find, why_refused,
            aligns=self.recipe.aligns, reported=self.roster.reported,
        )  # fmt: skip

    def _register(self, connection: Member) -> None:
        """Continue one connection's registration with the message that has arrived."""
        if connection.end_reason() and not connection.peer_name:  # closed before it registered
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
                lambda wanted, instance: self._take_id(wanted, instance, connection),
                lambda hello: self._answer_check(connection, hello),
                claim_error=self.admission.claim_error if self.recipe.aligns else None,
                elsewhere=self._elsewhere,
                secret=self.secret,
            )
            next(self._joining[connection])
        was_known = bool(connection.peer_name)
        try:
            next(self._joining[connection])
            if connection.peer_name and not was_known:
                self.events.say(f"{connection.peer_name} registered from {connection.address}")
        except StopIteration as end:
            del self._joining[connection]
            if end.value is None:
                self.members.drop(connection, "", MessageType.UNREGISTER)
            else:
                self._set_ready(end.value, connection)
        except SflError as error:
            del self._joining[connection]
            if connection.peer_name:
                self._free_place(connection, error)
            else:
                self.members.log_refusal(connection.address, str(error))
                self.members.drop(connection, str(error), last_words_for(error))

    def _welcome(self) -> Welcome:
        known = frozenset(k for k, place in self.roster.places.items() if place.instance)
        return Welcome(
            ANY_ID, self.recipe.run, self.admission.past.first_round if self.admission.past else 0,
            resumed=self.resumed, fed=self.fed, known=known, task_servers=self.task_servers,
            heartbeat_s=self.members.heartbeat_s, passing=passing_links(self.recipe.segments),
            tells=self.recipe.is_told_figures, caller=self.recipe.caller,
        )  # fmt: skip

    def _set_ready(self, joined: Joined, connection: Member) -> None:
        place = self.roster.places[joined.client]
        if why := self._why_refused(joined, place):
            self._disconnect(joined.client, ProtocolError(why))
            return
        before = (
            place.joined.fingerprint if place.joined else self.admission.past_fingerprint(joined)
        )
        for changed in differences(before, joined.fingerprint):
            self.events.say(
                f"warning: client_{joined.client} comes back with {changed} before: the last bit"
                " may differ"
            )
        place.joined, place.ready, place.is_skipped = joined, True, False
        place.refused = place.recurring = False
        connection.is_assigned = True
        if self.roster.has_begun:
            self.events.say(f"client_{joined.client} is back")
            self.on_return(joined)
            self._changes.append((joined.client, True))
            return
        shown = ", ".join(f"{count} {part}" for part, count in joined.data.num_samples.items())
        self.events.say(f"client_{joined.client} is ready: {shown} samples")
        self._warn_of_difference(joined)
        if not self.roster.complete:
            self.events.say(self.roster.missing_message)
            self.roster.notify()

    def _warn_of_difference(self, joined: Joined) -> None:
        """Warn if a client's data are incompatible with another's; the majority decides later."""
        reports = self.roster.reports()
        for other in reports:
            if why := data_difference(other, joined.client, reports, self.recipe):
                self.events.say(f"warning: {why}; when all are there, most decide")
                return

    def _free_place(self, connection: Member, error: SflError) -> None:
        """Drop a connection that failed before it was ready, and free its place."""
        client = self.roster.client_of(connection)
        if client is not None:
            self._disconnect(client, error)
        else:
            self.members.drop(connection, str(error))

    # In a round

    def wake(self) -> None:
        self.members.wake()

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        return self._wait_and_handle(links, gates)

    def _wait_and_handle(self, links: Collection[Link], gates: Collection[Gate]) -> Member | None:
        """Return one of ``links`` with a message, or None; handle all other connections."""
        members = self.members
        found: Member | None = None
        others: list[Member] = []

        def ready() -> bool:
            nonlocal found, others
            found = members.first_arrived(links)
            others = [c for c in members.ready_members() if c not in links]
            return bool(found or others or any(g() for g in gates))

        members.wait_until(ready, POLL_S)
        for connection in others:
            if connection not in members.members:
                continue  # dropped together with an earlier one
            client, why = self.roster.client_of(connection), connection.end_reason()
            if client is None or not self.roster.places[client].ready or why is None:
                self._register(connection)
            elif self.roster.has_begun:
                self.lost(client, why)
                self._changes.append((client, False))
            else:
                self._free_place(connection, why)
        if time.monotonic() - self._checked_at > POLL_S:
            self._check_timeouts(links)
        return None if self._changes else found

    def _check_timeouts(self, links: Collection[Link]) -> None:
        """Drop connections that do not register and stalled clients; report missing ones."""
        now = time.monotonic()
        elapsed_s, self._checked_at = now - self._checked_at, now
        for connection in self.members.members:
            if not connection.peer_name and connection.age_s() > REGISTER_WITHIN_S:
                self._joining.pop(connection, None)
                self.members.log_refusal(connection.address, "it did not register")
                reason = f"register within {REGISTER_WITHIN_S:g} seconds"
                self.members.drop(connection, reason, MessageType.TRY_AGAIN)
        if self.roster.has_begun:
            # The server's own computing between two calls does not count as waiting.
            self._drop_stalled(links, min(elapsed_s, 2 * POLL_S))
            if not self._is_ending:
                check_any_can_return(self.roster.places.values())
        if self.notice.update(self.roster.waiting_message(self.patience.skip_after_s)):
            self.roster.notify()
        self.roster.notify_if_due()

    def _drop_stalled(self, links: Collection[Link], elapsed_s: float) -> None:
        """Drop clients that the round waits for and that make no progress."""
        limit = LINGER_S if self._is_ending else self.patience.skip_after_s
        for client, place in self.roster.places.items():
            link, waits = place.link if place.ready else None, place.link in links
            step = place.step(self.recipe, self._round)
            place.clock.tick(link, step, waits=waits, elapsed_s=elapsed_s)
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
        return place.is_skipped or place.skipped_round == self._round

    def lost(self, client: int, error: SflError) -> None:
        if not (self.patience.may_return and isinstance(error, PEER_ERRORS)):
            raise error  # not the client's fault: a full disk, for example
        self._disconnect(client, error)

    def _disconnect(self, client: int, error: SflError) -> None:
        """Drop a client's connection, and tell the others whom they wait for."""
        place, refused = self.roster.places[client], is_refusal(error)
        if place.link:
            self._joining.pop(place.link, None)
            self.members.drop(place.link, str(error), last_words_for(error))
        place.free(error)
        free = "" if self.roster.has_begun else "; its place is free"
        self.events.say(f"client_{client} is {'refused' if refused else 'away'}: {error}{free}")
        if not place.is_skipped:
            self.roster.notify()

    def take_changes(self) -> list[tuple[int, bool]]:
        changes, self._changes = self._changes, []
        return changes

    def decide_skip(self, client: int) -> bool:
        place, limit = self.roster.places[client], self.patience.skip_after_s
        waits = not place.refused and limit and place.clock.idle_s < limit
        if place.is_here or not limit or waits:
            return False
        left = [k for k in self.roster.ready() if not self.is_skipped(k)]
        place.is_skipped = len(left) >= self.patience.min_clients
        if place.is_skipped and place.refused:
            place.skipped_round = self._round
        return place.is_skipped

    def wait_for_client(self) -> None:
        while not self.roster.ready():
            self._wait_and_handle([], [])

    def why_away(self, client: int) -> str:
        return self.roster.places[client].why

    def end_soon(self) -> None:
        self.patience = Patience(self.patience.may_return, GOODBYE_S, 0)
        self._is_ending, self._round = True, -1
        for place in self.roster.places.values():
            place.skipped_round = -2
