"""Which segments a cut model has, by name, and which party holds each."""

from collections.abc import Mapping
from enum import Enum

from torch import Tensor

from sfl.model.segment import Segment, Snapshot


class Holder(Enum):
    """Who holds a segment, and goes on from one round to the next with it."""

    CLIENT = "each client"
    SERVER = "the server"


# From the input to the output, and who holds each: n cuts give the first n + 1.
HOLDERS = {"front": Holder.CLIENT, "back": Holder.SERVER, "head": Holder.CLIENT}
States = Mapping[str, Mapping[str, Tensor]]  # weights by segment


def segment_names(num_cuts: int) -> tuple[str, ...]:
    """Return the names of a model's segments; one without a cut is all front."""
    return tuple(HOLDERS)[: num_cuts + 1]


def joined(states: States) -> dict[str, Tensor]:
    """Return the weights of several segments as one state dict: no two share a name."""
    return {name: tensor for state in states.values() for name, tensor in state.items()}


class Segments(dict[str, Segment]):
    """The segments that one party holds, by name, from the input to the output."""

    @property
    def first(self) -> Segment:
        return next(iter(self.values()))

    @property
    def last(self) -> Segment:
        return next(reversed(self.values()))

    def start_round(self, round_index: int) -> None:
        for segment in self.values():
            segment.start_round(round_index)

    def rest(self) -> None:
        for segment in self.values():
            segment.rest()

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: segment.state() for name, segment in self.items()}

    def load(self, states: States) -> None:
        """Take over the weights of these segments, among others."""
        for name, segment in self.items():
            segment.load(states[name])

    def snapshot(self, *, weights: bool = True) -> dict[str, Snapshot]:
        return {name: segment.snapshot(weights=weights) for name, segment in self.items()}

    def restore(self, snapshots: Mapping[str, Snapshot]) -> None:
        for name, segment in self.items():
            segment.restore(snapshots[name])
