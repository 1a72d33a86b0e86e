"""Who takes part in a round, and in which order each copy of the back takes their steps.

``draw`` gives the round's clients in the round's order. From it follows, for clients that share a
back, whose step is next::

    fronts are relayed     0 0 0 0  2 2 2 2  1 1 1 1     in turns, a client's round at a time
    --server-order fixed   0 2 1  0 2 1  0 2 1  0 2 1    step i of every client, then step i+1
                 arrival   as they come

A copy of the back that serves one client takes that client's steps as they come.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from sfl import seeds
from sfl.archive.spool import Spool
from sfl.config import RunConfig
from sfl.model.segment import Snapshot
from sfl.model.topology import Segments
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.sync_sgd import GradientPool
from sfl.weights.exchange import NamedWeights
from sfl.wire.driver import Gate


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

    def drop(self, client: int) -> None:
        """Leave out a client from now on."""
        if self._left is not None:
            left = self._left
            self._left = (k for k in left if k != client)
            if self._next == client:
                self.done()


class RoundPlan:
    """One round: who takes part, whose turn it is, and what passes from client to client."""

    def __init__(
        self,
        recipe: Recipe,
        round_index: int,
        num_steps: Mapping[int, int],
        backs: Mapping[int, Segments],
        *,
        spool: Spool,
        may_skip: bool = False,
        at_once: int = 0,
    ) -> None:
        """``num_steps``: of each client that is there, taking part in the round or not.

        ``may_skip``: a client may be dropped, so that what it did must be undone. ``at_once``: so
        many train at the same time, where each has a copy of the back; 0: all.
        """
        run, row = recipe.run, recipe.scheme
        self._scheme, self._backs, self._may_skip = row, backs, may_skip
        self._training: set[int] = set()  # who has begun, and has neither trained nor left
        self.spool = spool
        self.starts: dict[int, NamedWeights | None] = {}  # of who has begun: whose front it has
        self.ended: set[int] = set()
        self.left: set[int] = set()  # who was dropped
        self.unlike: set[int] = set()  # who sent something else when it redid a step
        self._snapshots: dict[int, Mapping[str, Snapshot]] = {}  # of a client's copy, before it
        self.order = draw(run, sorted(num_steps), round_index)
        self.num_steps = {k: num_steps[k] for k in self.order}
        in_turns = row.fronts is Fronts.RELAYED
        self._at_once = at_once
        self.rounds = Turns(tuple(self.order) if in_turns else None)
        self.relayed: NamedWeights | None = None  # what the next client starts from
        self.steps: dict[int, Turns] = {}
        self._taken: Counter[int] = Counter()  # steps that each back has taken
        self._taken_of: Counter[int] = Counter()  # steps of each client that its back has taken
        for b in backs:
            ours = [k for k in self.order if row.back_of(k) == b]
            fixed = len(ours) > 1 and not in_turns and run.server_order == "fixed"
            self.steps[b] = Turns(interleaved(ours, num_steps) if fixed else None)
        gathers = row.exchange is Exchange.WEIGHT_GRADS
        self.pool = GradientPool(run, backs[0].last, self.num_steps, spool) if gathers else None

    def num_steps_for(self, client: int) -> int:
        """Return how many answers a client waits for: its own steps, or those of the longest."""
        return self.num_steps[client] if self.pool is None else max(self.num_steps.values())

    def turn_of(self, client: int) -> Gate:
        """Return what opens when a client may train: at its turn, and again if it redoes it."""
        if client in self.starts:
            return lambda: True
        return self.rounds.of(client) if self.rounds.in_order else self._has_room

    def _has_room(self) -> bool:
        return not self._at_once or len(self._training) < self._at_once

    def begin(self, client: int) -> NamedWeights | None:
        """Begin a client's round, or let it redo it; return whose front it starts from."""
        if client not in self.starts:
            self.starts[client] = self.relayed
            self._training.add(client)
            if self._may_skip and self.leaves_no_trace(client) and self._backs:
                back = self._backs[self._back_of(client)]
                self._snapshots[client] = back.snapshot(weights=self.rounds.in_order)
        return self.starts[client]

    def end_turn(self, client: int, front: NamedWeights) -> None:
        """End a client's round with these weights, if it has not ended before."""
        if client not in self.ended and self.rounds.in_order:
            self.relayed = front
            self.rounds.done()
            self._snapshots.pop(client, None)
        self.ended.add(client)

    def rest(self, client: int) -> None:
        """Let a client that has trained make room for another one, with its copy of the back."""
        self._training.discard(client)
        if self._scheme.copies_back:
            self._backs[self._back_of(client)].rest()

    def drop(self, client: int) -> bool:
        """Go on without a client; say whether the round is as if it had never taken part.

        A back that others train as well, in between, keeps the steps that it has taken for it. One
        that it has for itself, or for its turn, goes back to where it was.
        """
        self.left.add(client)
        self._training.discard(client)
        self.order.remove(client)
        del self.num_steps[client]
        self.rounds.drop(client)
        for turns in self.steps.values():
            turns.drop(client)
        if self.pool is not None:
            self.pool.drop(client)
        if not self.leaves_no_trace(client):
            return False
        if snapshot := self._snapshots.pop(client, None):
            self._backs[self._back_of(client)].restore(snapshot)
            self._taken[self._back_of(client)] -= self._taken_of.pop(client, 0)
        return True

    def take(self, client: int) -> int:
        """Count a step of a client's back; return how many it had taken before."""
        back = self._back_of(client)
        self._taken[back] += 1
        self._taken_of[client] += 1
        return self._taken[back] - 1

    def _back_of(self, client: int) -> int:
        return self._scheme.back_of(client)

    def leaves_no_trace(self, client: int) -> bool:
        """Say whether nobody else's steps come between those of a client on its back."""
        back_of = self._scheme.back_of
        alone = all(back_of(k) != back_of(client) for k in self.order if k != client)
        return self.pool is None and (alone or self.rounds.in_order or not self._backs)
