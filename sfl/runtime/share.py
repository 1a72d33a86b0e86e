"""The share of the clients that one process of a server, a rank, serves; where the others go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.archive.layout import share_path
from sfl.strategy.ranks import block
from sfl.wire.link import ANY_ID


@dataclass(frozen=True)
class Share:
    """A rank's share of a run's clients: a block of their ids."""

    rank: int = 0
    size: int = 1  # number of ranks
    places: Sequence[Mapping[str, Any]] = ()  # of each rank: the content of GO_TO

    def ours(self, clients: Sequence[int]) -> list[int]:
        """Return those of these clients, all of the run, that this rank serves."""
        return block(clients, self.rank, self.size)

    def elsewhere(
        self, wanted: int, clients: Sequence[int], *, is_full: bool
    ) -> Mapping[str, Any] | None:
        """Return where a client goes that asks for an id of ``clients``; None: it stays here.

        One that takes any id goes from each full rank to the next one.
        """
        target = self.rank
        if wanted == ANY_ID:
            target = min(self.rank + is_full, self.size - 1)
        elif wanted in clients:
            target = next(r for r in range(self.size) if wanted in block(clients, r, self.size))
        return None if target == self.rank else self.places[target]

    def folder(self, run: Path) -> Path:
        """Return the folder of this rank's share of a run, by the run's folder."""
        return share_path(run, self.rank)
