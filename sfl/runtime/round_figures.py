"""The figures of a round, for each client and for all: bytes, messages, times, and metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfl.archive.round_log import DOWN, TRAFFIC, UP
from sfl.conversation.cut import kinds_by_link
from sfl.conversation.party import PREFIXES, TRAIN, RoundResult, ServerParty
from sfl.conversation.round import TIMES
from sfl.model.metrics import Tally, add_up
from sfl.model.task import Task
from sfl.strategy.recipe import Recipe
from sfl.wire.link import KINDS_DOWN, KINDS_UP, Counters

_TIMES = ("server_compute_s", *(f"client_{name}" for name in TIMES))
_BYTES = (UP.format(""), DOWN.format(""))
_SUMMED = (*TRAFFIC, *_TIMES)
Tallies = Mapping[str, Mapping[int, Tally]]  # by evaluated part and client


def client_figures(
    party: ServerParty,
    before: Counters,
    trained: RoundResult | None,
    tallies: Tallies,
) -> dict[str, float]:
    """Return one client's metrics of a round, in the order of the round's file.

    ``before``: the counters of its link at the round's start; ``trained``: None if it was not in
    the round.
    """
    now = party.link.counters
    figures: dict[str, float] = {"samples": party.num_samples[TRAIN] if trained else 0}
    for part, prefix in PREFIXES.items():
        tally = tallies.get(part, {}).get(party.client, Tally())
        figures |= party.task.figures(tally, prefix)
    seconds = trained.seconds if trained else dict.fromkeys(TIMES, 0.0)
    return figures | {
        "bytes_up": now.bytes_received - before.bytes_received,
        "bytes_down": now.bytes_sent - before.bytes_sent,
        "messages_up": now.messages_received - before.messages_received,
        "messages_down": now.messages_sent - before.messages_sent,
        "round_trips": now.round_trips - before.round_trips,
        **{UP.format(n): now.received[n] - before.received[n] for n in KINDS_UP},
        **{DOWN.format(n): now.sent[n] - before.sent[n] for n in KINDS_DOWN},
        **_bytes_by_link(party.recipe, now, before),
        **{f"client_{name}": seconds[name] for name in TIMES},
        "server_compute_s": party.compute_s,
        **party.spans,
    }


def evaluated_figures(task: Task, tallies: Tallies) -> dict[str, float]:
    """Return the figures of all clients' samples together, of each evaluated part."""
    figures: dict[str, float] = {}
    for part, by_client in tallies.items():
        figures |= task.figures(add_up(by_client.values()), PREFIXES[part])
    return figures


def packed(tally: Tally) -> list[Any]:
    """Return a tally as a value of JSON, which keeps every bit of it."""
    table = None if tally.table is None else tally.table.tolist()
    return [tally.samples, tally.counts, tally.loss_sum, table]


def unpacked(values: Sequence[Any]) -> Tally:
    """Return the tally that was ``packed``."""
    samples, counts, loss_sum, table = values
    return Tally(samples, tuple(counts), loss_sum, None if table is None else torch.tensor(table))


def _bytes_by_link(recipe: Recipe, now: Counters, before: Counters) -> Mapping[str, int]:
    """Return the bytes of the steps' tensors at the model's further cuts."""
    up, down = kinds_by_link(recipe.segments)
    received = {UP.format(n): now.received[n] - before.received[n] for n in up}
    return received | {DOWN.format(n): now.sent[n] - before.sent[n] for n in down}


def sums(clients: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Return the sums over the clients of what adds up: bytes, messages, times."""
    names = [n for n in next(iter(clients.values())) if n in _SUMMED or n.startswith(_BYTES)]
    return {name: sum(figures[name] for figures in clients.values()) for name in names}
