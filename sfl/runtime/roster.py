"""The ids of a run's clients, and which of them are registered and ready."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfl.conversation.join import AskedAbout
from sfl.conversation.report import DataReport
from sfl.errors import ConnectionLost, PeerFailed, RunError, counted
from sfl.runtime.client_places import Place
from sfl.wire.link import ANY_ID
from sfl.wire.members import Member
from sfl.wire.messages import MessageType

MOST_NAMED = 8  # clients that are ready, load their data, or are missing, in one line
TELL_EVERY_S = 0.5
MOST_REASONS = 3  # of clients that have left before the start, in one line


@dataclass
class Roster:
    """The places of a run's clients, by their ids."""

    run: str  # its name
    ids: frozenset[int]
    needed: int  # ready clients that start the run; more may register before that
    places: dict[int, Place] = field(default_factory=dict)
    has_begun: bool = False
    of_run: Sequence[int] = ()  # with several ranks, the ids of all clients of the run
    num_samples: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # once rounds begin
    _told_at: float = -math.inf  # when clients were told last who is missing
    _is_due: bool = False  # whether something has changed since

    def begin(self) -> None:
        """Begin the run: no other ids can register from now on."""
        self.ids, self.has_begun = frozenset(self.places), True

    def reports(self) -> dict[int, DataReport]:
        """Return the data reports of the ready clients."""
        places = sorted(self.places.items())
        return {k: place.joined.data for k, place in places if place.is_here and place.joined}

    @property
    def complete(self) -> bool:
        """Whether enough clients are ready, and no registered one is still loading its data."""
        return len(self.ready()) >= self.needed and self.ready() == self.taken()

    def ready(self) -> set[int]:
        return {k for k, place in self.places.items() if place.is_here}

    def taken(self) -> set[int]:
        return {k for k, place in self.places.items() if place.link}

    def loading(self) -> set[int]:
        """Return the clients that are connected and not ready yet."""
        return self.taken() - self.ready()

    @property
    def full_message(self) -> str:
        """A line that says that no other client can join."""
        return f"the run {self.run} has its {counted(len(self.of_run or self.places), 'client')}"

    @property
    def missing_message(self) -> str:
        """A line that names the clients that are not ready, and why they have left."""
        ready = self.ready()
        if self.has_begun:
            away = {k: p for k, p in self.places.items() if not p.is_here and not p.is_skipped}
            names = ", ".join(
                f"{'a corrected ' if p.refused else ''}client_{k} ({p.why})"
                for k, p in sorted(away.items())
            )
            return f"waiting for {names}"
        any_will_do = len(self.ids) > self.needed
        ids = sorted((self.taken() if any_will_do else self.ids) - ready)
        count = max(self.needed - len(ready), len(self.taken()) - len(ready))
        names = f": {', '.join([*map(str, ids[:MOST_NAMED]), *['...'] * (len(ids) > MOST_NAMED)])}"
        names *= bool(ids)
        left = [f"client_{k} ({p.why})" for k, p in sorted(self.places.items()) if p.has_left]
        if len(left) > MOST_REASONS:
            left[MOST_REASONS:] = ["..."]
        if left:
            names += f"; not there any more: {', '.join(left)}"
        return f"waiting for {count} of {counted(self.needed, 'client')}{names}"

    def waiting_message(self, limit_s: float | None) -> str:
        """Return a line about who is missing and who is there; "" if nobody is missing.

        ``limit_s``: how long a round waits for a client that is away.
        """
        if self.has_begun and all(p.is_here or p.is_skipped for p in self.places.values()):
            return ""
        until = f", at most {limit_s:g} s" if limit_s and self.has_begun else ""
        return f"{self.missing_message}; {self.there_message}{until}"

    def notify(self) -> None:
        """Tell the ready clients which ones are missing; who is lost, the lobby notices.

        A thousand clients that come one after another are told twice a second, not a thousand times
        each: ``notify_if_due`` makes up for what is left out here.
        """
        now = time.monotonic()
        self._is_due = now < self._told_at + TELL_EVERY_S
        if self._is_due:
            return
        self._told_at, line = now, self.missing_message
        for place in self.places.values():
            if place.is_here and place.link:
                with contextlib.suppress(ConnectionLost, PeerFailed):
                    place.link.send_message_as_json(MessageType.MESSAGE, content=line)

    def notify_if_due(self) -> None:
        if self._is_due and self.waiting_message(None):  # else all are there again
            self.notify()

    @property
    def there_message(self) -> str:
        """Some words that name the clients that are ready, and those that load their data."""
        here = {"there": self.ready(), "loading": self.loading()}
        words = [
            f"{counted(len(clients), 'client')} {what}"
            if len(clients) > MOST_NAMED
            else f"{what}: {', '.join(f'client_{k}' for k in sorted(clients))}"
            for what, clients in here.items()
            if clients
        ]
        return "; ".join(words) or "nobody is there"

    def check_id(self, wanted: int) -> None:
        if wanted not in self.ids:
            every = sorted(self.of_run or self.ids)
            is_contiguous = every == list(range(len(every)))
            known = f"0 to {every[-1]}" if is_contiguous else ", ".join(map(str, every))
            raise RunError(f"--client-id {wanted}: this run has the ids {known}")

    def find(self, wanted: int, about: AskedAbout | None = None) -> tuple[int, str]:
        """Return the id that a checking client would get, and why it is not free now, or "".

        ``about``: the client that another server asks about; then, why it has not this id.

        Raises:
            RunError: the run has no such client.
        """
        if about:
            self.check_id(wanted)
            place = self.places.get(wanted, Place())
            is_here = place.link is not None and about.is_of(place.instance)
            return wanted, "" if is_here else f"client_{wanted} is not registered there"
        free = sorted(self.ids - self.taken())
        if wanted == ANY_ID:
            return (free[0], "") if free else (min(self.ids), self.full_message)
        self.check_id(wanted)
        return wanted, "" if wanted in free else f"client_{wanted} is connected"

    def reported(self, client: int) -> dict[str, Any]:
        """Return what the server of a further task may know of a client's data; {}: nothing yet."""
        if not (self.num_samples and (joined := self.places[client].joined)):
            return {}
        counts, shape = self.num_samples[client], joined.data.input_shape
        return {"num_samples": dict(counts), "input_shape": list(shape)}

    def client_of(self, member: Member) -> int | None:
        return next((k for k, place in self.places.items() if place.link is member), None)
