"""The rounds of a run as the server sees them: train, merge, evaluate, write down.

Faces ``conversation.client_run``. The same code serves sockets and simulation; only the network and
the links differ.
"""

import time
from collections.abc import ItemsView, Mapping
from dataclasses import dataclass

from sfl.archive_writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.conversation import TIMES, server_evaluate_round, server_goodbye, server_train
from sfl.data import num_batches
from sfl.driver import Network, run_together
from sfl.link import KINDS_DOWN, KINDS_UP, Counters
from sfl.metrics import Tally, add_up
from sfl.order import RoundPlan
from sfl.outcome import (
    BACK,
    FRONT,
    ONE_CLIENT_MODEL,
    SERVER_OPTIMIZER,
    Half,
    averaging_weights,
    half_files,
    has_back_files,
    merge_backs,
    merge_fronts,
    model_path,
)
from sfl.party import PREFIXES, TRAIN, RoundResult, ServerParty
from sfl.protocol import MessageType
from sfl.roundlog import DOWN, TRAFFIC, UP, RoundLog
from sfl.schemes import Fronts, scheme
from sfl.segment import Segment
from sfl.split_model import SplitModel
from sfl.tensors import encode_state
from sfl.weights import AVERAGE, INITIAL, NamedWeights, WeightKey, client_weights


@dataclass
class Rounds:
    """The server's part of a run, for all clients."""

    run: RunConfig
    network: Network
    parties: Mapping[int, ServerParty]  # in the order of their clients
    backs: Mapping[int, Segment]
    split: SplitModel
    archive: ArchiveWriter
    log: RoundLog
    halves: dict[str, Half]  # the front and the back that everyone goes on from, where there is one
    first_round: int = 0

    def run_all(self) -> dict[str, float]:
        """Run all rounds that are left and return the figures of the last one."""
        if self.first_round == 0:
            self._write_halves(-1)
        if front := self.halves.get(FRONT):
            data = encode_state(front.state)
            keys = {k: WeightKey(INITIAL, p.at(self.first_round - 1)) for k, p in self._items()}
            run_together(self.network, {k: p.weights.put(keys[k], data) for k, p in self._items()})
        figures: dict[str, float] = {}
        for round_index in range(self.first_round, self.run.rounds):
            figures = self._round(round_index)
        for party in self.parties.values():
            party.link.send_message_as_json(MessageType.TRAINING_DONE, content=figures)
        run_together(self.network, {k: server_goodbye(p) for k, p in self._items()})
        return figures

    def _items(self) -> ItemsView[int, ServerParty]:
        return self.parties.items()

    def _round(self, round_index: int) -> dict[str, float]:
        """Run one round and return its figures."""
        started = time.perf_counter()
        before = {k: party.link.counters.copy() for k, party in self._items()}
        plan, trained = self._train(round_index)
        self._merge(round_index, plan, trained)
        tallies = self._evaluate(round_index, plan)
        overall = self.log.train_figures()
        for part, prefix in PREFIXES.items():
            overall |= add_up(t[part] for t in tallies.values() if part in t).figures(prefix)
        for party in self.parties.values():
            at = party.at(round_index)
            party.link.send_message_as_json(MessageType.VALIDATION_DONE, content=overall, at=at)
        clients = {
            k: self._client_figures(party, before[k], trained.get(k), tallies[k])
            for k, party in self._items()
        }
        overall |= _sums(clients)
        overall["seconds"] = time.perf_counter() - started
        self.log.end_round(round_index, clients, overall)
        self.archive.end_round(round_index)
        return overall

    def _train(self, round_index: int) -> tuple[RoundPlan, dict[int, RoundResult]]:
        """Let the round's clients train; all copies of the back start with the same weights."""
        for segment in self.backs.values():
            segment.start_round(round_index)
        plan = RoundPlan(self.run, round_index, self.num_steps, self.backs)
        self.log.start_round(round_index, sum(plan.num_steps.values()))
        for party in self.parties.values():
            party.compute_s = 0.0
        conversations = {k: server_train(self.parties[k], plan, round_index) for k in plan.order}
        return plan, run_together(self.network, conversations)

    @property
    def num_steps(self) -> dict[int, int]:
        """Each client's steps in a round."""
        counts = {k: party.num_samples[TRAIN] for k, party in self._items()}
        run = self.run
        return {k: num_batches(n, run.batch_size) * run.local_epochs for k, n in counts.items()}

    def _merge(self, round_index: int, plan: RoundPlan, trained: Mapping[int, RoundResult]) -> None:
        """Make of what was trained what everyone goes on from, and write it down."""
        for k, result in sorted(trained.items()):
            if result.file:
                path = model_path(ONE_CLIENT_MODEL, round_index, client=k)
                self.archive.write("one_client_model", path, result.file, round_index)
        num_train = {k: self.parties[k].num_samples[TRAIN] for k in sorted(plan.order)}
        weights = averaging_weights(self.run, num_train)
        names = self.split.parameter_names
        fronts = {k: result.front for k, result in trained.items()}
        merged = {}
        if FRONT in self.halves:
            merged[FRONT] = merge_fronts(
                self.run, fronts, weights, start=self.halves[FRONT], trained=names,
                last=plan.order[-1],
            )  # fmt: skip
        if has_back_files(self.run):
            backs = {b: segment.state() for b, segment in self.backs.items()}
            start = self.halves[BACK]
            merged[BACK] = merge_backs(self.run, backs, weights, start=start, trained=names)
        self.halves = {name: half for name, half in merged.items() if half is not None}
        self._write_halves(round_index)
        owner = BACK if has_back_files(self.run) else FRONT  # whose weights the server's copies are
        for segment in self.backs.values():
            segment.load(self.halves[owner].state)

    def _write_halves(self, round_index: int) -> None:
        """Write down what everyone goes on from, with what else the next round starts from."""
        for name, half in self.halves.items():
            for kind, path, data in half_files(name, half, round_index):
                self.archive.write(kind, path, data, round_index)
        if self.run.optimizer_state == "keep" and round_index >= 0:
            for b, segment in self.backs.items():
                path = model_path(SERVER_OPTIMIZER, round_index, back=b)
                state = encode_state(segment.optimizer_state())
                self.archive.write("server_optimizer", path, state, round_index)

    def _evaluate(self, round_index: int, plan: RoundPlan) -> dict[int, dict[str, Tally]]:
        """Let every client evaluate what the round gave; the last of a relay has its front."""
        front, policy = None, scheme(self.run.scheme).fronts
        if policy is Fronts.RELAYED:
            front = plan.relayed
        elif policy is Fronts.AVERAGED:
            half = self.halves.get(FRONT)  # the fed server's, where that is apart
            samples = sum(self.parties[k].num_samples[TRAIN] for k in plan.order)
            front = NamedWeights(AVERAGE, encode_state(half.state) if half else b"", samples)
        conversations = {
            k: server_evaluate_round(
                party, None if front and front.name == client_weights(k) else front, round_index
            )
            for k, party in self._items()
        }
        return run_together(self.network, conversations)

    def _client_figures(
        self,
        party: ServerParty,
        before: Counters,
        trained: RoundResult | None,
        tallies: Mapping[str, Tally],
    ) -> dict[str, float]:
        """Return one client's figures of a round, in the order of the round's file."""
        now = party.link.counters
        figures: dict[str, float] = {"samples": party.num_samples[TRAIN] if trained else 0}
        for part, prefix in PREFIXES.items():
            figures |= tallies.get(part, Tally()).figures(prefix)
        seconds = trained.seconds if trained else dict.fromkeys(TIMES, 0.0)
        return figures | {
            "bytes_up": now.bytes_received - before.bytes_received,
            "bytes_down": now.bytes_sent - before.bytes_sent,
            "messages_up": now.messages_received - before.messages_received,
            "messages_down": now.messages_sent - before.messages_sent,
            "round_trips": now.round_trips - before.round_trips,
            **{UP.format(n): now.received[n] - before.received[n] for n in KINDS_UP},
            **{DOWN.format(n): now.sent[n] - before.sent[n] for n in KINDS_DOWN},
            **{f"client_{name}": seconds[name] for name in TIMES},
            "server_compute_s": party.compute_s,
        }


_TIMES = ("server_compute_s", *(f"client_{name}" for name in TIMES))
_SUMMED = (*TRAFFIC, *_TIMES)


def _sums(clients: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(figures[name] for figures in clients.values()) for name in _SUMMED}
