"""The rounds of a run as the server sees them: train, average, evaluate, write down.

Faces ``conversation.client_run``. The same code serves sockets and simulation; only the network and
the links differ.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sfl.aggregate import fed_avg
from sfl.archive_writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.conversation import TIMES, server_evaluate_round, server_goodbye, server_train
from sfl.data import num_batches
from sfl.driver import Network, run_together
from sfl.link import Counters
from sfl.party import PREFIXES, TRAIN, RoundResult, ServerParty
from sfl.protocol import MessageType
from sfl.roundlog import RoundLog
from sfl.schemes import scheme
from sfl.segment import Segment, Tally, add_up
from sfl.split_model import SplitModel
from sfl.tensors import encode_state
from sfl.weights import WeightKey

# Where a run's weights lie in its folder; {round} counts from 0, "init" is before round 0.
CLIENT_MODEL = "models/client_model_{round}.pt"
SERVER_MODEL = "models/server_model_{round}.pt"
ONE_CLIENT_MODEL = "models/client_{client}_{round}.pt"
SERVER_OPTIMIZER = "models/server_optimizer_{back}_{round}.pt"


def model_path(template: str, round_index: int, **which: int) -> str:
    """Return the path of a file of weights after a round; -1 stands for before the first."""
    name = "init" if round_index < 0 else f"{round_index:03d}"
    return template.format(round=name, **which)


def averaging_weights(run: RunConfig, num_samples: Mapping[int, int]) -> dict[int, int]:
    """Return each client's weight in an average: its training samples, or 1."""
    equal = run.aggregation_weights == "equal"
    return {client: 1 if equal else count for client, count in num_samples.items()}


def average_backs(
    run: RunConfig, backs: Mapping[int, Mapping[str, Tensor]], weights: Mapping[int, int]
) -> dict[str, Tensor]:
    """Return the average of the copies of the back, each weighted by the clients it served."""
    back_of = scheme(run.scheme).back_of
    served = {b: sum(w for k, w in weights.items() if back_of(k) == b) for b in backs}
    return fed_avg([backs[b] for b in backs], [served[b] for b in backs])


@dataclass
class Rounds:
    """The server's part of a run, for all clients."""

    run: RunConfig
    network: Network
    parties: Mapping[int, ServerParty]
    backs: Mapping[int, Segment]
    split: SplitModel
    archive: ArchiveWriter
    log: RoundLog

    def run_all(self) -> dict[str, float]:
        """Run all rounds and return the figures of the last one."""
        front, back = (encode_state(s) for s in (self.split.front_state(), self.split.back_state()))
        self.archive.write("client_model", model_path(CLIENT_MODEL, -1), front, -1)
        self.archive.write("server_model", model_path(SERVER_MODEL, -1), back, -1)
        put = {k: p.weights.put(WeightKey("init", p.at(-1)), front) for k, p in self._parties()}
        run_together(self.network, put)
        figures: dict[str, float] = {}
        for round_index in range(self.run.rounds):
            figures = self._round(round_index)
        for _, party in self._parties():
            party.link.send_message_as_json(MessageType.TRAINING_DONE, content=figures)
        run_together(self.network, {k: server_goodbye(party) for k, party in self._parties()})
        return figures

    def _parties(self) -> list[tuple[int, ServerParty]]:
        return sorted(self.parties.items())

    def _round(self, round_index: int) -> dict[str, float]:
        """Run one round and return its figures."""
        started = time.perf_counter()
        before = {k: party.link.counters.copy() for k, party in self._parties()}
        trained = self._train(round_index)
        front = self._average(round_index, trained)
        tallies = self._evaluate(round_index, front)
        overall = self.log.train_figures()
        for part, prefix in PREFIXES.items():
            overall |= add_up(t[part] for t in tallies.values() if part in t).figures(prefix)
        for _, party in self._parties():
            at = party.at(round_index)
            party.link.send_message_as_json(MessageType.VALIDATION_DONE, content=overall, at=at)
        clients = {
            k: self._client_figures(party, before[k], trained[k], tallies[k])
            for k, party in self._parties()
        }
        overall |= _sums(clients)
        overall["seconds"] = time.perf_counter() - started
        self.log.end_round(round_index, clients, overall)
        self.archive.end_round(round_index)
        return overall

    def _train(self, round_index: int) -> dict[int, RoundResult]:
        """Let all clients train; each copy of the back starts with the same weights."""
        if self.run.optimizer_state == "reset":
            for segment in self.backs.values():
                segment.reset_optimizer()
        orders = {b: itertools.count() for b in self.backs}
        back_of = scheme(self.run.scheme).back_of
        self.log.start_round(round_index, sum(num_steps(self.run, p) for _, p in self._parties()))
        conversations = {}
        for k, party in self._parties():
            party.compute_s = 0.0
            conversations[k] = server_train(party, orders[back_of(k)], round_index)
        return run_together(self.network, conversations)

    def _average(self, round_index: int, trained: Mapping[int, RoundResult]) -> bytes:
        """Average both halves and write them down; the backs take over theirs.

        Returns the file of the averaged front.
        """
        weights = averaging_weights(self.run, {k: p.num_samples[TRAIN] for k, p in self._parties()})
        fronts = {k: result.front for k, result in sorted(trained.items())}
        for k, state in fronts.items():
            path = model_path(ONE_CLIENT_MODEL, round_index, client=k)
            self.archive.write("one_client_model", path, encode_state(state), round_index)
        front = encode_state(fed_avg(list(fronts.values()), [weights[k] for k in fronts]))
        states = {b: segment.state() for b, segment in self.backs.items()}
        back = average_backs(self.run, states, weights)
        self.archive.write(
            "client_model", model_path(CLIENT_MODEL, round_index), front, round_index
        )
        back_path = model_path(SERVER_MODEL, round_index)
        self.archive.write("server_model", back_path, encode_state(back), round_index)
        for b, segment in self.backs.items():
            if self.run.optimizer_state == "keep":  # replay of the next round starts from it
                path = model_path(SERVER_OPTIMIZER, round_index, back=b)
                kept = encode_state(segment.optimizer_state())
                self.archive.write("server_optimizer", path, kept, round_index)
            segment.load(back)
        return front

    def _evaluate(self, round_index: int, front: bytes) -> dict[int, dict[str, Tally]]:
        return run_together(
            self.network,
            {k: server_evaluate_round(p, front, round_index) for k, p in self._parties()},
        )

    def _client_figures(
        self,
        party: ServerParty,
        before: Counters,
        trained: RoundResult,
        tallies: Mapping[str, Tally],
    ) -> dict[str, float]:
        """Return one client's figures of a round, in the order of the round's file."""
        now = party.link.counters
        figures: dict[str, float] = {"samples": party.num_samples[TRAIN]}
        for part, prefix in PREFIXES.items():
            figures |= tallies.get(part, Tally()).figures(prefix)
        return figures | {
            "bytes_up": now.bytes_received - before.bytes_received,
            "bytes_down": now.bytes_sent - before.bytes_sent,
            "messages_up": now.messages_received - before.messages_received,
            "messages_down": now.messages_sent - before.messages_sent,
            **{f"client_{name}": trained.seconds[name] for name in TIMES},
            "server_compute_s": party.compute_s,
        }


_TIMES = ("server_compute_s", *(f"client_{name}" for name in TIMES))
_SUMMED = ("bytes_up", "bytes_down", "messages_up", "messages_down", *_TIMES)


def _sums(clients: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(figures[name] for figures in clients.values()) for name in _SUMMED}


def num_steps(run: RunConfig, party: ServerParty) -> int:
    """Return a client's number of steps in a round."""
    return num_batches(party.num_samples[TRAIN], run.batch_size) * run.local_epochs
