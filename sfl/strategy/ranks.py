"""Ranks: the processes of one server, each with a block of the clients.

What a round decides, it decides by the values of all clients. ``gather`` gives them to every rank,
and ``pass_on`` makes sums over all: each rank adds its clients to what the ranks before it have
added, so that a sum has the same additions in the same order as with one rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Add = Callable[[Tensor], None]  # adds to a float64 tensor, in place
PassOn = Callable[[Add, Tensor], None]


def block(clients: Sequence[int], rank: int, size: int) -> list[int]:
    """Return the clients of a rank: a contiguous part of all, in their order."""
    count = len(clients)
    return list(clients[rank * count // size : (rank + 1) * count // size])


def add_here(add: Add, sums: Tensor) -> None:
    """Add to sums that no other rank adds to."""
    add(sums)


def as_it_is(value: Any) -> Any:
    return value


class Ranks(Protocol):
    """The ranks of a server, as one of them sees them.

    All call the same methods in the same order; each call waits for all. Raises ``RunError`` where
    another rank has ended.
    """

    def ours(self, clients: Sequence[int]) -> list[int]:
        """Return those of these clients, all of the run, that this rank serves."""

    def gather(
        self,
        own: Mapping[int, T],
        pack: Callable[[T], Any] = as_it_is,
        unpack: Callable[[Any], T] = as_it_is,
    ) -> dict[int, T]:
        """Return the values of all ranks' clients, in their order.

        ``pack`` makes a value one of JSON, for the other ranks; ``unpack`` makes it what it was.
        """

    def pass_on(self, add: Add, sums: Tensor) -> None:
        """Let all ranks add to ``sums`` (N,) float64, one after the other; all get the result."""

    def leave(self) -> None:
        """Wait until all have come here: a rank that ends breaks calls that others are still in."""

    def record(self) -> dict[str, Any]:
        """Return what a share's record says of the ranks; nothing with one rank."""


class OneRank:
    """A server in one process."""

    def ours(self, clients: Sequence[int]) -> list[int]:
        return list(clients)

    def gather(
        self,
        own: Mapping[int, T],
        pack: Callable[[T], Any] = as_it_is,
        unpack: Callable[[Any], T] = as_it_is,
    ) -> dict[int, T]:
        return dict(own)

    def pass_on(self, add: Add, sums: Tensor) -> None:
        add_here(add, sums)

    def leave(self) -> None: ...

    def record(self) -> dict[str, Any]:
        return {}
