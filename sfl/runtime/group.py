"""The processes of one server, called ranks; a server in one process is alone.

``Group`` is what ranks need before there is a network of clients: to agree on options, addresses
and folders. Later ``Ranks`` takes over, which lets the network work while it waits.
"""

import platform
from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

from sfl.archive.run_folder import EventLog, RunFolder, resume_hint
from sfl.errors import ConfigError, RunError
from sfl.nodes import HOST
from sfl.runtime.resume import Past, why_finished
from sfl.runtime.share import Share
from sfl.strategy.ranks import OneRank, Ranks, block
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import Network

T = TypeVar("T")


class Group(Protocol):
    """The ranks of a server, as one of them sees them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def command(self) -> str:
        """How the server is started, for users; "": in one process."""

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, each a value of JSON; wait for all.

        Raises:
            RunError: another rank has ended.
        """

    def ranks(self, network: Network, events: EventLog) -> Ranks:
        """Return what the ranks of a run do together, while ``network`` goes on working.

        ``events`` are told when that takes long.
        """


class Alone:
    """A server in one process."""

    rank, size, command = 0, 1, ""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def ranks(self, network: Network, events: EventLog) -> Ranks:
        return OneRank()


ALONE = Alone()


def in_turn(group: Group, call: Callable[[], T]) -> T:
    """Make a call at each rank, one after the other; return this rank's result."""
    results = []
    for turn in range(group.size):
        if turn == group.rank:
            results.append(call())
        group.gather(None)
    return results[0]


def share_of(group: Group, port: int, advertise: str) -> Share:
    """Return this rank's share, with the places at which clients reach all ranks.

    ``port``: that it listens on; ``advertise``: a host at which clients reach it. Without one, a
    rank on the machine of this one is reached at the host that the client has used for this one.

    Raises:
        ConfigError: a machine's name is no name of a host.
    """
    machine = platform.node()
    known = group.gather([machine, advertise, port])
    places = [
        {"host": host or ("" if theirs == machine else theirs), "port": port}
        for theirs, host, port in known
    ]
    for rank, place in enumerate(places):
        if place["host"] and not HOST.fullmatch(place["host"]):
            raise ConfigError(
                f"clients cannot be sent to rank {rank}: its machine's name, {place['host']!r}, is"
                " no host name: give --advertise HOST there"
            )
    return Share(group.rank, group.size, places)


def common_past(past: Past | None, recipe: Recipe, group: Group) -> Past | None:
    """Keep the checkpoints of rounds that all ranks have; None: all begin.

    Raises:
        ConfigError: the run is finished, at all ranks.
        RunError: the run was not one of so many ranks, or one lacks its share of it.
    """
    if past and past.own_rounds:
        ours = block(sorted(past.num_samples), group.rank, group.size)
        if sorted(past.own_rounds) != ours:
            raise RunError(
                f"{past.files.root} has the clients {_span(past.own_rounds)}, and this process"
                f" would serve {_span(ours)}: go on with as many processes as the run had"
            )
    if all(ends := group.gather(why_finished(past, recipe) if past else "")):
        raise ConfigError(ends[group.rank])
    known = group.gather([c.round for c in past.checkpoints] if past else [])
    common = set(known[0]).intersection(*known)
    if past and common:
        return past.only(common)
    if any(max(rounds, default=0) > 0 for rounds in known):
        shown = "; ".join(
            f"{rank}: {', '.join(str(index + 1) for index in rounds) or 'none'}"
            for rank, rounds in enumerate(known)
        )
        raise RunError(f"the server's processes have no round in common to go on with: {shown}")
    return None  # a rank was lost before any had taken a step


def _span(clients: Collection[int]) -> str:
    return f"{min(clients)} to {max(clients)}"


def hint_of(group: Group, folder: RunFolder, model: str) -> Callable[[], str]:
    """Return ``resume_hint`` for the whole run."""
    run = folder.path.parent if group.rank else folder.path
    return resume_hint(run, model, group.command)
