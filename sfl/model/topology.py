"""The names of a cut model's segments, and the party that holds each."""

from collections.abc import Mapping
from enum import Enum

from torch import Tensor

from sfl.model.segment import Segment, Snapshot


class Holder(Enum):
    """The party that holds a segment and keeps its weights from round to round."""

    CLIENT = "each client"
    SERVER = "the server"


# From input to output; n cuts give the first n + 1 segments.
HOLDERS = {"front": Holder.CLIENT, "back": Holder.SERVER, "head": Holder.CLIENT}
States = Mapping[str, Mapping[str, Tensor]]  # weights by segment


def segment_names(num_cuts: int) -> tuple[str, ...]:
    """Return the names of a model's segments; without a cut, the whole model is the front."""
    return tuple(HOLDERS)[: num_cuts + 1]


def joined(states: States) -> dict[str, Tensor]:
    """Return the weights of several segments as one state dict; their names are distinct."""
    return {name: tensor for state in states.values() for name, tensor in state.items()}


class Segments(dict[str, Segment]):
    """The segments that one party holds, by name, from input to output."""

    @property
    def first(self) -> Segment:
        return next(iter(self.values()))

    @property
    def last(self) -> Segment:
        return next(reversed(self.values()))

    def start_round(self, round_index: int) -> None:
        for segment in self.values():
            segment.start_round(round_index)

    def release(self) -> None:
        for segment in self.values():
            segment.release()

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: segment.state() for name, segment in self.items()}

    def load(self, states: States) -> None:
        """Load the weights of these segments; ``states`` may have more."""
        for name, segment in self.items():
            segment.load(states[name])

    def snapshot(self, *, weights: bool = True) -> dict[str, Snapshot]:
        return {name: segment.snapshot(weights=weights) for name, segment in self.items()}

    def restore(self, snapshots: Mapping[str, Snapshot]) -> None:
        for name, segment in self.items():
            segment.restore(snapshots[name])
