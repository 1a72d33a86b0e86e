"""Running conversations: one over a blocking link, or many as their messages arrive.

A conversation is a generator. It yields the link that it receives from next, or a gate: a condition
that other conversations fulfil. All of them run on one thread, which owns their segments.

When a client is lost, its conversation is dropped, and started again once the client has
reconnected. So a conversation must detect what is already done; between two yields it does all or
nothing, and what it has begun before a yield it undoes when it is dropped.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from sfl.errors import PEER_ERRORS, RunError, SflError
from sfl.wire.link import Link

T = TypeVar("T")
Gate = Callable[[], bool]  # returns whether it is open
Conversation = Generator[Link | Gate, None, T]


class Network(Protocol):
    """The clients of a run's conversations, with one call to wait for all their messages."""

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        """Return one of ``links`` that has a message or has failed; block until there is one.

        Return None when the caller should check again: ``wake`` was called or a gate opened, a
        client outside ``links`` was lost or reconnected, or time has passed.
        """

    def wake(self) -> None:
        """Make ``wait`` check the gates again; called from other threads."""

    def start_round(self, round_index: int) -> None: ...

    def is_here(self, client: int) -> bool:
        """Return whether a client is connected and ready."""

    def is_skipped(self, client: int) -> bool:
        """Return whether the round goes on without this client."""

    def lost(self, client: int, error: SflError) -> None:
        """Record that a client's link has failed.

        Raises:
            SflError: ``error`` itself, where clients cannot reconnect.
        """

    def take_changes(self) -> list[tuple[int, bool]]:
        """Return the clients that were lost (False) or reconnected (True) since the last call."""

    def why_away(self, client: int) -> str:
        """Return why a client is absent."""

    def end_soon(self) -> None:
        """Shorten the wait for absent clients: the run is over except for its last messages."""

    def decide_skip(self, client: int) -> bool:
        """Decide whether to skip an absent client from now on; return the decision."""

    def wait_for_client(self) -> None:
        """Wait until at least one client is connected and ready.

        Raises:
            RunError: no client can come any more.
        """


class NoReconnects:
    """Defaults of a network whose clients cannot reconnect: the first loss ends the run."""

    def wake(self) -> None: ...

    def start_round(self, round_index: int) -> None: ...

    def is_here(self, client: int) -> bool:
        return True

    def is_skipped(self, client: int) -> bool:
        return False

    def lost(self, client: int, error: SflError) -> None:
        raise error

    def take_changes(self) -> list[tuple[int, bool]]:
        return []

    def why_away(self, client: int) -> str:
        return ""

    def end_soon(self) -> None: ...

    def decide_skip(self, client: int) -> bool:
        return False

    def wait_for_client(self) -> None:
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
    may_leave: Callable[[int], bool] = lambda client: True,
    keep_results: bool = True,
) -> dict[int, T]:
    """Run one conversation per client, concurrently; return the result of each.

    ``conversations`` are factories, called again when a lost client has reconnected. A client that
    the network skips has no result, and ``on_leave`` is called with it; it is waited for while
    ``may_leave`` is false. A result stays if its client is lost later; when the client reconnects,
    only with ``keep_results``.
    """
    network.take_changes()  # discard earlier ones
    together = _Together(network, conversations, keep_results)
    for client in conversations:
        if network.is_here(client):
            together.start(client)
    while together.is_open():
        for client, is_back in network.take_changes():
            together.start(client) if is_back else together.stop(client)
        for client in together.skip_absent(may_leave):
            on_leave(client)
        together.resume_one()
    return {k: together.results[k] for k in conversations if k in together.results}


class _Together(Generic[T]):
    """Conversations that run, clients that are absent, and results."""

    def __init__(
        self,
        network: Network,
        conversations: Mapping[int, Callable[[], Conversation[T]]],
        keep_results: bool,
    ) -> None:
        self._network = network
        self._keep_results = keep_results
        self._factories = conversations
        self._running: dict[int, Conversation[T]] = {}
        self._receiving: dict[Link, int] = {}
        self._links: dict[int, Link] = {}  # the link each client's conversation receives from
        self._waiting: dict[Gate, dict[int, None]] = {}  # clients that wait for each gate, in order
        self._gates: dict[int, Gate] = {}  # the gate each of them waits for
        self._skipped: set[int] = set()
        self._awaited = set(conversations)  # absent clients without result that are not skipped
        self.results: dict[int, T] = {}

    def is_open(self) -> bool:
        """Return whether a conversation runs, or an absent client is waited for."""
        return bool(self._running or self._awaited)

    def start(self, client: int) -> None:
        """Start a client's conversation, unless it has none here or is skipped."""
        self.stop(client)
        if client in self._factories and client not in self._skipped:
            if not self._keep_results:
                self.results.pop(client, None)
            self._running[client] = self._factories[client]()
            self._awaited.discard(client)
            self._resume(client)

    def stop(self, client: int) -> None:
        """Drop a client's conversation, if it runs."""
        if conversation := self._running.pop(client, None):
            conversation.close()
            if client not in self.results:
                self._awaited.add(client)
        self._release(client)
        if link := self._links.pop(client, None):
            self._receiving.pop(link, None)

    def skip_absent(self, may_leave: Callable[[int], bool]) -> Iterator[int]:
        """Skip absent clients that may leave, if the network decides so; yield each."""
        if not self._awaited:
            return
        for client in [k for k in self._factories if k in self._awaited]:
            if may_leave(client) and self._network.decide_skip(client):
                self._skipped.add(client)
                self._awaited.discard(client)
                yield client

    def resume_one(self) -> None:
        """Resume a conversation whose gate is open or whose message has arrived; wait for one."""
        free = next((next(iter(held)) for gate, held in self._waiting.items() if gate()), None)
        if free is not None:
            self._release(free)
        elif not self.is_open():
            return
        elif link := self._network.wait(self._receiving, self._waiting):
            free = self._receiving.pop(link)
        if free is not None:
            self._resume(free)

    def _wait_at(self, client: int, gate: Gate) -> None:
        self._waiting.setdefault(gate, {})[client] = None
        self._gates[client] = gate

    def _release(self, client: int) -> None:
        """Remove a client from its gate, if it waits for one."""
        if gate := self._gates.pop(client, None):
            del self._waiting[gate][client]
            if not self._waiting[gate]:
                del self._waiting[gate]

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
                self._wait_at(client, due)
