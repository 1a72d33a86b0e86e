"""Running conversations: alone over a link that blocks, or many as their messages arrive.

A conversation is straight-line code that yields the link it is about to receive from, or a gate:
what it waits for among the other conversations. It computes where it is resumed, so that one thread
owns all the segments that it touches.

A conversation whose client is lost is dropped, and begun again when the client is back. So it must
find out by itself what has been done already; between two yields it either does all or nothing.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Generic, Protocol, TypeVar

from sfl.errors import PEER_ERRORS, RunError, SflError
from sfl.wire.link import Link

T = TypeVar("T")
Gate = Callable[[], bool]  # whether it is open
Conversation = Generator[Link | Gate, None, T]


class Network(Protocol):
    """Who takes part in conversations, and one place to wait for all their messages."""

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        """Return one of ``links`` that has a message or has failed; block until there is one.

        None if something else happened: a gate has opened, as ``wake`` says; a client was lost that
        is not in ``links``, or is back; or time has passed.
        """

    def wake(self) -> None:
        """Look at the gates again; called from other threads."""

    def start_round(self, round_index: int) -> None:
        """Take note that a round begins."""

    def is_here(self, client: int) -> bool:
        """Say whether a client is connected and ready."""

    def is_out(self, client: int) -> bool:
        """Say whether nobody waits for a client any more."""

    def lost(self, client: int, error: SflError) -> None:
        """Take note that a client's link, which was being used, is of no more use.

        Raises:
            SflError: nobody comes back here.
        """

    def take_changes(self) -> list[tuple[int, bool]]:
        """Return who was lost, or is back (True), since the last call, in that order."""

    def why_away(self, client: int) -> str:
        """Say why a client is not here."""

    def end_soon(self) -> None:
        """Wait only shortly for whoever is away: all that is left is to say goodbye."""

    def gives_up(self, client: int) -> bool:
        """Say whether to go on without a client that is away."""

    def await_anybody(self) -> None:
        """Wait until a client is here.

        Raises:
            RunError: nobody comes.
        """


class AllStay:
    """What a network answers where nobody comes back: the first loss ends the run."""

    def wake(self) -> None: ...

    def start_round(self, round_index: int) -> None: ...

    def is_here(self, client: int) -> bool:
        return True

    def is_out(self, client: int) -> bool:
        return False

    def lost(self, client: int, error: SflError) -> None:
        raise error

    def take_changes(self) -> list[tuple[int, bool]]:
        return []

    def why_away(self, client: int) -> str:
        return ""

    def end_soon(self) -> None: ...

    def gives_up(self, client: int) -> bool:
        return False

    def await_anybody(self) -> None:
        raise RunError("no client is left")


def run_blocking(conversation: Conversation[T]) -> T:
    """Run a conversation without gates over a link whose receives block."""
    while True:
        try:
            next(conversation)
        except StopIteration as end:
            result: T = end.value
            return result


def run_together(
    network: Network,
    conversations: Mapping[int, Callable[[], Conversation[T]]],
    on_leave: Callable[[int], None] = lambda client: None,
    *,
    results_stay: bool = True,
) -> dict[int, T]:
    """Run one conversation a client, each as its messages arrive; return what each returns.

    ``conversations`` begin one, and begin it again when a client that was lost is back. A client
    that the network gives up has no result, unless it had one before and ``results_stay`` when a
    client begins again; ``on_leave`` is told.
    """
    network.take_changes()  # of before: who is here now, counts
    together = _Together(network, conversations, results_stay)
    for client in conversations:
        if network.is_here(client):
            together.begin(client)
    while together.is_open():
        for client, is_back in network.take_changes():
            together.begin(client) if is_back else together.stop(client)
        for client in together.given_up():
            on_leave(client)
        together.go_on()
    return {k: together.results[k] for k in conversations if k in together.results}


class _Together(Generic[T]):
    """Conversations that run, those that wait for their clients, and what has come of them."""

    def __init__(
        self,
        network: Network,
        conversations: Mapping[int, Callable[[], Conversation[T]]],
        results_stay: bool,
    ) -> None:
        self._network = network
        self._results_stay = results_stay
        self._beginnings = conversations
        self._running: dict[int, Conversation[T]] = {}
        self._receiving: dict[Link, int] = {}
        self._links: dict[int, Link] = {}  # that each client's conversation receives from
        self._held: dict[Gate, dict[int, None]] = {}  # who waits for each gate, in order
        self._gates: dict[int, Gate] = {}  # which each of them waits for
        self._left: set[int] = set()
        self._expected = set(conversations)  # who neither runs, nor has a result, nor has left
        self.results: dict[int, T] = {}

    def is_open(self) -> bool:
        """Say whether a conversation runs, or waits for a client that is to come back."""
        return bool(self._running or self._expected)

    def begin(self, client: int) -> None:
        """Begin a client's conversation, if it has one here and has not left."""
        self.stop(client)
        if client in self._beginnings and client not in self._left:
            if not self._results_stay:
                self.results.pop(client, None)
            self._running[client] = self._beginnings[client]()
            self._expected.discard(client)
            self._resume(client)

    def stop(self, client: int) -> None:
        """Drop a client's conversation, if one runs."""
        if conversation := self._running.pop(client, None):
            conversation.close()
            if client not in self.results:
                self._expected.add(client)
        self._release(client)
        if link := self._links.pop(client, None):
            self._receiving.pop(link, None)

    def given_up(self) -> list[int]:
        """Return the clients that have just left without a result."""
        if not self._expected:
            return []
        left = [k for k in self._beginnings if k in self._expected and self._network.gives_up(k)]
        self._left.update(left)
        self._expected.difference_update(left)
        return left

    def go_on(self) -> None:
        """Resume one conversation whose gate is open or whose message is there, or wait."""
        free = next((next(iter(held)) for gate, held in self._held.items() if gate()), None)
        if free is not None:
            self._release(free)
        elif not self.is_open():
            return
        elif link := self._network.wait(self._receiving, self._held):
            free = self._receiving.pop(link)
        if free is not None:
            self._resume(free)

    def _hold(self, client: int, gate: Gate) -> None:
        self._held.setdefault(gate, {})[client] = None
        self._gates[client] = gate

    def _release(self, client: int) -> None:
        """Let a client wait for a gate no longer, if it did."""
        if gate := self._gates.pop(client, None):
            del self._held[gate][client]
            if not self._held[gate]:
                del self._held[gate]

    def _resume(self, client: int) -> None:
        try:
            due = next(self._running[client])
        except StopIteration as end:
            self.results[client] = end.value
            del self._running[client]
        except PEER_ERRORS as error:
            self.stop(client)
            self._network.lost(client, error)
        else:
            if isinstance(due, Link):
                self._receiving[due], self._links[client] = client, due
            else:
                self._hold(client, due)
