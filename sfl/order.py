"""Who takes part in a round, and in which order each copy of the back takes their steps.

``draw`` gives the round's clients in the round's order. From it follows, for clients that share a
back, whose step is next::

    sl                       0 0 0 0  2 2 2 2  1 1 1 1     in turns, a client's round at a time
    sflv2, --server-order
           fixed             0 2 1  0 2 1  0 2 1  0 2 1    step i of every client, then step i+1
           arrival           as they come

A copy of the back that serves one client takes that client's steps as they come.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from sfl import seeds
from sfl.config import RunConfig
from sfl.driver import Gate
from sfl.gradients import GradientPool
from sfl.schemes import Exchange, Fronts, scheme
from sfl.segment import Segment
from sfl.weights import NamedWeights


def draw(run: RunConfig, clients: Sequence[int], round_index: int) -> list[int]:
    """Return the clients that take part in a round, in the round's order.

    McMahan et al. 2017, Algorithm 1: ``m = max(C K, 1)`` clients, here rounded to the nearest.
    """
    count = max(math.floor(run.participation * len(clients) + 0.5), 1)
    drawn = seeds.generator(run.seed, seeds.CLIENT_ORDER, round_index)
    return [clients[i] for i in torch.randperm(len(clients), generator=drawn)[:count].tolist()]


def interleaved(order: Sequence[int], num_steps: Mapping[int, int]) -> Iterator[int]:
    """Yield whose step is next: each client's step i, in order, before anyone's step i+1."""
    for step in range(max(num_steps[k] for k in order)):
        yield from (k for k in order if step < num_steps[k])


class Turns:
    """Whose turn it is, by a sequence of clients; without one it is always everyone's."""

    def __init__(self, sequence: Iterable[int] | None) -> None:
        self._left = None if sequence is None else iter(sequence)
        self._next = None if self._left is None else next(self._left, None)

    @property
    def in_order(self) -> bool:
        return self._left is not None

    def of(self, client: int) -> Gate:
        """Return what opens when it is this client's turn."""
        return lambda: self._left is None or self._next == client

    def done(self) -> None:
        """End the turn of whose turn it is."""
        if self._left is not None:
            self._next = next(self._left, None)


class RoundPlan:
    """One round: who takes part, whose turn it is, and what passes from client to client."""

    def __init__(
        self,
        run: RunConfig,
        round_index: int,
        num_steps: Mapping[int, int],
        backs: Mapping[int, Segment],
    ) -> None:
        """``num_steps``: of each client in a round, taking part or not."""
        row = scheme(run.scheme)
        self.order = draw(run, sorted(num_steps), round_index)
        self.num_steps = {k: num_steps[k] for k in self.order}
        in_turns = row.fronts is Fronts.RELAYED
        self.rounds = Turns(self.order if in_turns else None)
        self.relayed: NamedWeights | None = None  # what the next client starts from
        self.steps: dict[int, Turns] = {}
        self.taken = {b: itertools.count() for b in backs}  # steps that a back has taken
        for b in backs:
            ours = [k for k in self.order if row.back_of(k) == b]
            fixed = len(ours) > 1 and not in_turns and run.server_order == "fixed"
            self.steps[b] = Turns(interleaved(ours, num_steps) if fixed else None)
        gathers = row.exchange is Exchange.WEIGHT_GRADS
        self.pool = GradientPool(run, backs[0], self.num_steps) if gathers else None

    def num_steps_for(self, client: int) -> int:
        """Return how many answers a client waits for: its own steps, or those of the longest."""
        return self.num_steps[client] if self.pool is None else max(self.num_steps.values())

    def end_turn(self, front: NamedWeights) -> None:
        """End the turn of the client that these weights are from, if clients take turns."""
        if self.rounds.in_order:
            self.relayed = front
            self.rounds.done()
