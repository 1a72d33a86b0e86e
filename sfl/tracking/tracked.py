"""What trackers are given: of a run at its start, and of each round at its end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:  # --help imports this module, and torch takes seconds
    from torch import Tensor

ROUND = "round"  # whose figures they are, if not one client's


@dataclass(frozen=True)
class TrackedRun:
    """A run at its start."""

    name: str
    folder: Path  # for the trackers' files
    config: Mapping[str, Any]  # every option of the run; those of the machine are not told
    steps_in_round: int  # of the client that takes the most
    first_round: int
    is_resumed: bool
    classes: Sequence[str] = ()  # what the task tells apart
    say: Callable[[str], None] = lambda line: None  # a line for the user

    def num_before(self, round_index: int) -> int:
        """Return where a round's steps begin, counted over the whole run."""
        return round_index * self.steps_in_round


class Row(NamedTuple):
    """One figure."""

    client: int | None  # None: of all
    step: int | None  # in the round, from 0; None: of the round
    metric: str
    value: float


@dataclass(frozen=True)
class TrackedRound:
    """The figures of a round, from 0, as its files have them."""

    index: int
    overall: Mapping[str, float]  # the columns of rounds.csv
    texts: Mapping[str, str]  # its columns that are no numbers
    clients: Mapping[int, Mapping[str, float]]
    steps: Mapping[int, Sequence[Mapping[str, float]]]  # of each client, in order
    weights: Mapping[str, "Tensor"] = field(default_factory=dict)  # merged, if they are wanted
    # Of the test set, int64 counts (class, what it is taken for); None if the round has none, or
    # labels or outputs stay at the clients.
    confusion: "Tensor | None" = None

    def rows(self) -> Iterator[Row]:
        """Yield the figures of the round: of all, then of each client."""
        yield from (Row(None, None, *item) for item in self.overall.items())
        for client, figures in sorted(self.clients.items()):
            yield from (Row(client, None, *item) for item in figures.items())

    def step_rows(self) -> Iterator[Row]:
        """Yield the figures of each client's steps."""
        for client, steps in sorted(self.steps.items()):
            for step, figures in enumerate(steps):
                yield from (Row(client, step, *item) for item in figures.items())


def title_of(row: Row) -> str:
    """Return the name of a figure's curve: round/val_loss, step/client_0/loss."""
    whose = ROUND if row.client is None else f"client_{row.client}"
    return f"{whose}/{row.metric}" if row.step is None else f"step/{whose}/{row.metric}"


class Tracker(Protocol):
    """Shows a run's figures somewhere; its methods are called on a background thread, in order.

    The keyword-only arguments of its constructor are its options. Whatever a method raises ends
    this tracker alone.
    """

    package: ClassVar[str]  # that it needs; "": none
    histograms: int  # every N-th round's merged weights are wanted; 0: none

    def start(self, run: TrackedRun) -> str:
        """Begin, or go on with the curves of a resumed run; return a line that says where."""

    def add(self, done: TrackedRound) -> None:
        """Take a round's figures."""

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """End with the last round's figures; ``failed``: the run did not come to its end."""
