"""A round's clients, and the order in which each copy of the back takes their steps.

``draw`` returns the round's clients in the round's order. It determines, for clients that share a
back, the order of steps::

    fronts are relayed     0 0 0 0  2 2 2 2  1 1 1 1     in turns, a client's round at a time
    --server-order fixed   0 2 1  0 2 1  0 2 1  0 2 1    step i of every client, then step i+1
                 arrival   as they arrive

A copy of the back that serves one client takes its steps as they arrive.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

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


def num_drawn(run: RunConfig, num_clients: int) -> int:
    """Return how many of these clients take part in a round.

    McMahan et al. 2017, Algorithm 1: ``m = max(C K, 1)``, here rounded to the nearest.
    """
    return max(math.floor(run.participation * num_clients + 0.5), 1)


def draw(run: RunConfig, clients: Sequence[int], round_index: int) -> list[int]:
    """Return the clients that take part in a round, in the round's order."""
    count = num_drawn(run, len(clients))
    drawn = seeds.generator(run.seed, seeds.CLIENT_ORDER, round_index)
    return [clients[i] for i in torch.randperm(len(clients), generator=drawn)[:count].tolist()]


def interleaved(order: Sequence[int], num_steps: Mapping[int, int]) -> Iterator[int]:
    """Yield the client of each step: step i of all clients, in order, then step i+1."""
    for step in range(max(num_steps[k] for k in order)):
        yield from (k for k in order if step < num_steps[k])


class Turns:
    """Turns given by a sequence of clients; without one, it is always every client's turn."""

    def __init__(self, sequence: Iterable[int] | None) -> None:
        self._left = None if sequence is None else iter(sequence)
        self._next = None if self._left is None else next(self._left, None)
        self._in_step: int | None = None  # the client that is in a step

    @property
    def in_order(self) -> bool:
        return self._left is not None

    def of(self, client: int) -> Gate:
        """Return a gate that is open when it is this client's turn."""
        return lambda: self.is_of(client)

    def is_of(self, client: int) -> bool:
        """Return whether it is this client's turn; without a sequence, if no other is in a step."""
        return self._next == client if self.in_order else self._in_step in (None, client)

    @contextlib.contextmanager
    def step(self, client: int) -> Iterator[None]:
        """Keep other clients from beginning a step before this client's is done, or given up."""
        self._in_step = client
        try:
            yield
        finally:
            self._in_step = None

    def done(self) -> None:
        if self._left is not None:
            self._next = next(self._left, None)

    def drop(self, client: int) -> None:
        """Remove a client's remaining turns."""
        if self._left is not None:
            left = self._left
            self._left = (k for k in left if k != client)
            if self._next == client:
                self.done()


class RoundPlan:
    """One round: its clients, their turns, and the front that is relayed between them."""

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
        """``num_steps``: of each connected client, in the round or not.

        ``may_skip``: clients may be dropped, so keep snapshots for undoing their steps.
        ``at_once``: number of clients that train at the same time; 0: all.
        """
        run, row = recipe.run, recipe.scheme
        self.round_index = round_index
        self._scheme, self._backs, self._may_skip = row, backs, may_skip
        self._training: set[int] = set()  # clients that train now
        self.spool = spool
        self.starts: dict[int, NamedWeights | None] = {}  # the front that each client started from
        self.ended: set[int] = set()
        self.dropped: set[int] = set()
        self.mismatched: set[int] = set()  # clients that repeated a step with other tensors
        self._snapshots: dict[int, Mapping[str, Snapshot]] = {}  # of a client's back at its start
        self.order = draw(run, sorted(num_steps), round_index)
        self.num_steps = {k: num_steps[k] for k in self.order}
        self._leaders = [k for k in self.order if recipe.leader(k) == k]
        in_turns = row.fronts is Fronts.RELAYED
        self._at_once = at_once
        self.rounds = Turns(tuple(self.order) if in_turns else None)
        self.relayed: NamedWeights | None = None  # the front that the next client starts from
        self.steps: dict[int, Turns] = {}  # of each back
        self._taken: Counter[int] = Counter()  # steps taken, by back
        self._taken_of: Counter[int] = Counter()  # steps taken, by client
        for b in backs:
            ours = [k for k in self._leaders if row.back_of(k) == b]
            fixed = len(ours) > 1 and not in_turns and run.server_order == "fixed"
            self.steps[b] = Turns(interleaved(ours, num_steps) if fixed else None)
        gathers = row.exchange is Exchange.WEIGHT_GRADS
        self.pool = GradientPool(run, backs[0].last, self.num_steps, spool) if gathers else None

    def num_own_steps(self, clients: Collection[int]) -> int:
        """Return the round's steps of these clients; those that all take together count once."""
        return sum(self.num_steps[k] for k in self._leaders if k in clients)

    def all_have_trained(self, clients: Collection[int]) -> bool:
        """Return whether those of these clients that are in the round have trained."""
        return not self._training and all(k in self.starts for k in self.order if k in clients)

    def is_training(self, client: int) -> bool:
        return client in self._training

    def num_steps_for(self, client: int) -> int:
        """Return the number of replies to a client: its steps, or with a pool the most of any."""
        return self.num_steps[client] if self.pool is None else max(self.num_steps.values())

    def turn_of(self, client: int) -> Gate:
        """Return a gate that is open when a client may train; always, if it repeats its round."""
        if client in self.starts:
            return lambda: True
        return self.rounds.of(client) if self.rounds.in_order else self._has_room

    def _has_room(self) -> bool:
        return not self._at_once or len(self._training) < self._at_once

    def begin(self, client: int) -> NamedWeights | None:
        """Start or repeat a client's round; return the relayed front that it starts from."""
        if client not in self.starts:
            self.starts[client] = self.relayed
            self._training.add(client)
            if self._may_skip and self.can_undo(client) and self._backs:
                back = self._backs[self._back_of(client)]
                self._snapshots[client] = back.snapshot(weights=self.rounds.in_order)
        return self.starts[client]

    def end_turn(self, client: int, front: NamedWeights) -> None:
        """End a client's round with these weights; do nothing if it has ended before."""
        if client not in self.ended and self.rounds.in_order:
            self.relayed = front
            self.rounds.done()
            self._snapshots.pop(client, None)
        self.ended.add(client)

    def release(self, client: int) -> None:
        """Free a trained client's slot, and the training memory of a back that only it has."""
        self._training.discard(client)
        if self._backs and self._is_alone(client):
            self._backs[self._back_of(client)].release()

    def drop(self, client: int) -> bool:
        """Remove a client from the round; return whether its steps are undone.

        A back that other clients train in between keeps the client's steps. A back that only this
        client trains, or trains in turn, is restored from its snapshot.
        """
        self.dropped.add(client)
        self._training.discard(client)
        self.order.remove(client)
        del self.num_steps[client]
        self.rounds.drop(client)
        for turns in self.steps.values():
            turns.drop(client)
        if self.pool is not None:
            self.pool.drop(client)
        if not self.can_undo(client):
            return False
        if snapshot := self._snapshots.pop(client, None):
            self._backs[self._back_of(client)].restore(snapshot)
            self._taken[self._back_of(client)] -= self._taken_of.pop(client, 0)
        return True

    def take(self, client: int) -> int:
        """Count a step of a client's back; return the number of its earlier steps."""
        back = self._back_of(client)
        self._taken[back] += 1
        self._taken_of[client] += 1
        return self._taken[back] - 1

    def _back_of(self, client: int) -> int:
        return self._scheme.back_of(client)

    def can_undo(self, client: int) -> bool:
        """Return whether no other client's steps come between a client's steps on its back."""
        in_turns = self.rounds.in_order
        return self.pool is None and (in_turns or not self._backs or self._is_alone(client))

    def _is_alone(self, client: int) -> bool:
        """Return whether no other client of the round has this client's back."""
        back = self._back_of(client)
        return all(self._back_of(k) != back for k in self.order if k != client)
