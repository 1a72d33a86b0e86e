"""Conversations whose clients are lost: dropped, begun again, or given up."""

from collections.abc import Collection, Iterator

import pytest

from sfl.errors import ConnectionLost, RunError, SflError
from sfl.wire.driver import Conversation, Gate, NoReconnects, run_together
from sfl.wire.link import Absent, Link


class Script(NoReconnects):
    """Does in each wait what the script says next: a link arrives, a client is lost or is back."""

    def __init__(self, script: Collection[tuple[str, int]], given_up: Collection[int] = ()) -> None:
        self.links: dict[int, Link] = {k: Absent(k) for k in range(3)}
        self.lost_clients: list[int] = []
        self._script: Iterator[tuple[str, int]] = iter(script)
        self._changes: list[tuple[int, bool]] = []
        self._here = {0, 1, 2}
        self._given_up = set(given_up)

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        what, client = next(self._script)
        if what == "arrives":
            assert self.links[client] in links
            return self.links[client]
        self._changes.append((client, what == "back"))
        (self._here.add if what == "back" else self._here.discard)(client)
        return None

    def is_here(self, client: int) -> bool:
        return client in self._here

    def take_changes(self) -> list[tuple[int, bool]]:
        changes, self._changes = self._changes, []
        return changes

    def lost(self, client: int, error: SflError) -> None:
        self.lost_clients.append(client)
        self._here.discard(client)

    def decide_skip(self, client: int) -> bool:
        return client in self._given_up and client not in self._here


class Talk:
    """Conversations that hear so many messages each, and count how often they were begun."""

    def __init__(self, network: Script, messages: int = 2, fails: Collection[int] = ()) -> None:
        self.begun = [0, 0, 0]
        self._network, self._messages, self._fails = network, messages, set(fails)

    def __call__(self, client: int) -> Conversation[str]:
        self.begun[client] += 1
        number = self.begun[client]
        for _ in range(self._messages):
            yield self._network.links[client]
            if client in self._fails:
                self._fails.discard(client)
                raise ConnectionLost("gone")
        return f"{client}, the {number}."

    def of(self, *clients: int) -> dict[int, object]:
        return {k: lambda k=k: self(k) for k in clients}


def test_a_lost_conversation_begins_again_from_its_beginning() -> None:
    script = [("arrives", 0), ("arrives", 1), ("arrives", 1), ("back", 0)]
    network = Script([*script, ("arrives", 0), ("arrives", 0)])
    talk = Talk(network, fails={0})
    assert run_together(network, talk.of(0, 1)) == {0: "0, the 2.", 1: "1, the 1."}
    assert network.lost_clients == [0]


def test_who_is_lost_while_nothing_is_awaited_of_it_begins_again_too() -> None:
    script = [("arrives", 0), ("lost", 0), ("back", 0), ("arrives", 0), ("arrives", 0)]
    network = Script(script)
    assert run_together(network, Talk(network).of(0)) == {0: "0, the 2."}


@pytest.mark.parametrize("stay", [True, False])
def test_a_result_stays_or_not_when_its_client_begins_again(stay: bool) -> None:
    """Client 0 has its result, is back, and is lost again before it has another."""
    done = [("arrives", 0), ("arrives", 0), ("lost", 0), ("back", 0), ("arrives", 0), ("lost", 0)]
    script = [*done, ("arrives", 1), ("arrives", 1), ("back", 0), ("arrives", 0), ("arrives", 0)]
    network = Script(script)
    results = run_together(network, Talk(network).of(0, 1), keep_results=stay)
    assert results == {0: "0, the 1." if stay else "0, the 3.", 1: "1, the 1."}


def test_who_is_given_up_has_no_result_and_does_not_come_in_again() -> None:
    script = [("lost", 2), ("arrives", 0), ("back", 2), ("arrives", 0)]
    network = Script(script, given_up={2})
    left: list[int] = []
    talk = Talk(network)
    assert run_together(network, talk.of(0, 2), left.append) == {0: "0, the 1."}
    assert left == [2]
    assert talk.begun == [1, 0, 1]


def test_who_may_not_leave_is_waited_for() -> None:
    """Once client 1 has left, client 0 is one of too few."""
    script = [("lost", 1), ("lost", 0), ("back", 0), ("arrives", 0), ("arrives", 0)]
    network = Script([*script, ("arrives", 2), ("arrives", 2)], given_up={0, 1})
    left: list[int] = []
    results = run_together(
        network, Talk(network).of(0, 1, 2), left.append, may_leave=lambda client: not left
    )
    assert results == {0: "0, the 2.", 2: "2, the 1."}
    assert left == [1]


def test_where_nobody_comes_back_the_first_loss_ends_all() -> None:
    class Plain(Script):
        def lost(self, client: int, error: SflError) -> None:
            NoReconnects.lost(self, client, error)

    network = Plain([("arrives", 0)])
    with pytest.raises(ConnectionLost, match="gone"):
        run_together(network, Talk(network, fails={0}).of(0))
    with pytest.raises(RunError, match="no client is left"):
        network.wait_for_client()
