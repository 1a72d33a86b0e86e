"""``TOPOLOGIES``: which party holds each segment of a cut model, as the rows of a table.

A model is a row of blocks; each cut makes one segment more. From the row of a topology every party
derives its part of a step (``route``): forward in order, the loss at the holder of the last
segment, backward in reverse order. The link of a tensor is the index of its cut; the first is 0.

Hops stand between the clients and the server, in a chain: a tensor between two parties that are no
neighbours passes through those between them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from sfl.errors import ConfigError, counted
from sfl.model.segment import Segment, Snapshot


class Holder(Enum):
    """The party that holds a segment and keeps its weights from round to round.

    In the order of the chain: what clients send reaches the server through the hops.
    """

    CLIENT = "each client"
    HOP_1 = "hop 1"
    HOP_2 = "hop 2"
    HOP_3 = "hop 3"
    HOP_4 = "hop 4"
    HOP_5 = "hop 5"
    HOP_6 = "hop 6"
    HOP_7 = "hop 7"
    HOP_8 = "hop 8"
    SERVER = "the server"

    @property
    def place(self) -> int:
        """The place in the chain: 0 for the clients, K for hop K."""
        return _CHAIN.index(self)

    @property
    def role(self) -> str:
        """As ``--role`` names a hop, and as proofs name who connects."""
        return self.name.lower().replace("_", ":")

    @property
    def is_hop(self) -> bool:
        return self in HOPS


_CHAIN = tuple(Holder)
HOPS = _CHAIN[1:-1]  # as many as ``sfl.nodes.MOST_HOPS``


FRONT = "front"  # the first segment; without a cut, the whole model
BACK = "back"  # the server's first
_PLACES = {2: "head", 3: "tail"}  # in the names of further segments


@dataclass(frozen=True)
class Topology:
    """One row: the holders of the segments of a model with so many cuts, and their names.

    Clients own the labels; where a client holds the last segment, it computes the loss, and no
    label leaves it.
    """

    source: str
    holders: Callable[[int], Sequence[Holder]]  # number of cuts -> holder of each segment
    num_cuts: range  # that it can have
    # Whether all clients take part in each step, each with a first segment of its own for its part
    # of the same samples; else each client takes steps of its own.
    joins: bool = False
    # Whether each task has a server of its own, all behind the clients' segment; the main server
    # has the first. A client adds up the gradients that they send, the last server's first, in the
    # order in which autograd would.
    has_tasks: bool = False

    def segments(self, num_cuts: int) -> dict[str, Holder]:
        """Return the holder of each segment, by the segment's name, from input to output."""
        holders = list(self.holders(num_cuts))
        names = [
            f"{h.name.lower()}_{_PLACES.get(i, f'segment_{i}')}" for i, h in enumerate(holders)
        ]
        for hop in HOPS:
            if hop in holders:
                names[holders.index(hop)] = hop.name.lower()
        names[0] = FRONT
        if Holder.SERVER in holders:
            names[holders.index(Holder.SERVER)] = BACK
        return dict(zip(names, holders, strict=True))


def alternating(num_cuts: int) -> Sequence[Holder]:
    """Return holders that take turns, the clients first."""
    return [Holder.SERVER if index % 2 else Holder.CLIENT for index in range(num_cuts + 1)]


MAX_CUTS = 64
TOPOLOGIES: dict[str, Topology] = {
    "vanilla": Topology(
        source="Gupta & Raskar, JNCA 2018 (arXiv 1810.06060)",
        holders=alternating,
        num_cuts=range(1, 2),
    ),
    "u-shaped": Topology(
        source="Vepakomma et al., 2018 (arXiv 1812.00564), without label sharing",
        holders=alternating,
        num_cuts=range(2, 3),
    ),
    "alternating": Topology(
        source="edge, centre, edge, centre, ...: Vepakomma et al., 2018 (arXiv 1812.00564)",
        holders=alternating,
        num_cuts=range(1, MAX_CUTS + 1),
    ),
    "vertical": Topology(
        source="Ceballos et al., 2020 (arXiv 2008.04137), SplitNN for vertically partitioned data",
        holders=alternating,
        num_cuts=range(1, 2),
        joins=True,
    ),
    "extended-vanilla": Topology(
        source="Vepakomma et al., 2018 (arXiv 1812.00564), extended vanilla split learning",
        holders=lambda _: [Holder.CLIENT, Holder.HOP_1, Holder.SERVER],
        num_cuts=range(2, 3),
        joins=True,
    ),
    "multi-hop": Topology(
        source="Vepakomma et al., 2018 (arXiv 1812.00564), Tor-like multi-hop split learning",
        holders=lambda num_cuts: [Holder.CLIENT, *HOPS[: num_cuts - 1], Holder.SERVER],
        num_cuts=range(2, len(HOPS) + 2),
    ),
    "multi-task": Topology(
        source="Vepakomma et al., 2018 (arXiv 1812.00564), multi-task split learning",
        holders=alternating,
        num_cuts=range(1, 2),
        has_tasks=True,
    ),
    "vertical-multi-task": Topology(
        source="Vepakomma et al., 2018 (arXiv 1812.00564), multi-task with partitioned input",
        holders=alternating,
        num_cuts=range(1, 2),
        joins=True,
        has_tasks=True,
    ),
    "u-shaped-hop": Topology(
        source="u-shaped, over one hop: no label leaves a client",
        holders=lambda _: [Holder.CLIENT, Holder.HOP_1, Holder.SERVER, Holder.CLIENT],
        num_cuts=range(3, 4),
    ),
}


def default_topology(num_cuts: int) -> str:
    """Return the name of the first topology that can have so many cuts."""
    return next((n for n, row in TOPOLOGIES.items() if num_cuts in row.num_cuts), "alternating")


def check_cuts(name: str, row: Topology, cuts: Sequence[int]) -> None:
    """Check that a topology can have these cuts.

    Raises:
        ConfigError: it has another number of them.
    """
    if len(cuts) not in row.num_cuts:
        least, most = row.num_cuts[0], row.num_cuts[-1]
        wanted = counted(least, "cut") if least == most else f"{least} to {most} cuts"
        shown = ",".join(map(str, cuts))
        raise ConfigError(f"--topology {name} takes {wanted}; --cut {shown} has {len(cuts)}")


def hop_of(role: str) -> Holder | None:
    """Return the hop that ``--role`` names, as ``hop:1``; None if it names another party."""
    return {hop.role: hop for hop in HOPS}.get(role)


def role_before(hop: str) -> str:
    """Return the role of those who connect to a hop of this role."""
    return _CHAIN[[holder.role for holder in _CHAIN].index(hop) - 1].role


def hops_of(segments: Mapping[str, Holder]) -> list[Holder]:
    """Return the hops that hold segments, in the order of the chain."""
    return [hop for hop in HOPS if hop in segments.values()]


@dataclass(frozen=True)
class Stop:
    """One of a party's segments on the way through the model, and the links beside it.

    A link is None where there is none: in front of the model, behind it, and between two segments
    of one party.
    """

    segment: str
    takes: int | None  # the link that its input comes over
    gives: int | None  # the link that its output goes over
    is_last: bool  # the loss follows


@dataclass(frozen=True)
class Relay:
    """A cut whose tensors pass through a party that holds neither of the segments beside it."""

    link: int
    is_onward: bool  # whether activations go towards the server, and gradients come back


Route = tuple[Stop | Relay, ...]


def route(segments: Mapping[str, Holder], holder: Holder) -> Route:
    """Return a party's segments, from input to output, with the links beside them, and relays."""
    holders = [*segments.values()]
    pairs = [*itertools.pairwise(holders)]
    links = [link if one is not other else None for link, (one, other) in enumerate(pairs)]
    between = zip([None, *links], [*links, None], strict=True)
    found: list[Stop | Relay] = []
    for index, (name, (takes, gives)) in enumerate(zip(segments, between, strict=True)):
        if holders[index] is holder:
            found.append(Stop(name, takes, gives, is_last=index == len(pairs)))
        if gives is not None and _passes(holder, *pairs[index]):
            one, other = pairs[index]
            found.append(Relay(gives, is_onward=one.place < other.place))
    return tuple(found)


def _passes(holder: Holder, one: Holder, other: Holder) -> bool:
    """Return whether what one party sends another passes through a third."""
    first, last = sorted((one.place, other.place))
    return first < holder.place < last


def stops(way: Route) -> tuple[Stop, ...]:
    """Return the segments of a party's route, without relays."""
    return tuple(stop for stop in way if isinstance(stop, Stop))


def is_onward(segments: Mapping[str, Holder], holder: Holder, link: int) -> bool:
    """Return whether the other side of one of a party's cuts lies towards the server."""
    one, other = [*segments.values()][link : link + 2]
    return max(one.place, other.place) > holder.place


def passing_links(segments: Mapping[str, Holder]) -> frozenset[int] | None:
    """Return the links of cuts between client and server, if hops stand between these; else None.

    What crosses such a cut passes through the hops.
    """
    if not hops_of(segments):
        return None
    ends = {Holder.CLIENT, Holder.SERVER}
    pairs = enumerate(itertools.pairwise(segments.values()))
    return frozenset(link for link, pair in pairs if set(pair) == ends)


def first_link(segments: Mapping[str, Holder]) -> int:
    """Return the first link between two parties."""
    pairs = itertools.pairwise(segments.values())
    return next(link for link, (one, other) in enumerate(pairs) if one is not other)


def holds_last(way: Route) -> bool:
    """Return whether a party's way ends at the model's last segment, so that it has the loss."""
    return any(stop.is_last for stop in stops(way))


States = Mapping[str, Mapping[str, Tensor]]  # weights by segment


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

    def undo_step(self) -> None:
        for segment in self.values():
            segment.undo_step()

    def update_weights(self) -> None:
        for segment in self.values():
            segment.update()

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
