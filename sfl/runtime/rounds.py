"""Run the server's side of all rounds: train, merge, evaluate, record.

Faces ``conversation.round.client_run``. The same code serves sockets and simulation; only the
network and the links differ.
"""

import contextlib
import functools
import time
from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from sfl.archive.layout import ONE_CLIENT_MODEL, segment_path
from sfl.archive.round_log import RoundLog
from sfl.archive.run_folder import RUN_STOPS
from sfl.archive.spool import Spool
from sfl.archive.writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.conversation.cut import Cut
from sfl.conversation.join import Joined
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.limits import server_limits
from sfl.conversation.party import TEST, TRAIN, VALIDATION, RoundResult, ServerParty
from sfl.conversation.round import server_evaluate_part, server_goodbye, server_start, server_train
from sfl.crash import crash_point
from sfl.data.client_data import num_batches
from sfl.errors import PEER_ERRORS
from sfl.files.torch_file import encode_state
from sfl.model.finite_check import REJECT
from sfl.model.metrics import Tally
from sfl.model.segment import Snapshot
from sfl.model.topology import Segments, States
from sfl.runtime.round_figures import client_figures, evaluated_figures, packed, sums, unpacked
from sfl.runtime.round_files import front_file, optimizer_files
from sfl.strategy.early_stopping import RoundsSeen
from sfl.strategy.merge import (
    Shared,
    Trained,
    averaging_weights,
    check_merged,
    merge,
    shared_files,
)
from sfl.strategy.order import RoundPlan
from sfl.strategy.ranks import OneRank, Ranks
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Fronts
from sfl.strategy.split_model import SplitModel
from sfl.weights.exchange import AVERAGE, INITIAL, NamedWeights, WeightStore, client_weights
from sfl.wire.driver import Conversation, Network, run_together
from sfl.wire.link import Link
from sfl.wire.messages import MessageType
from sfl.wire.payload import MakeStore

T = TypeVar("T")


@dataclass
class Rounds:
    """The server's part of a run, for all clients."""

    network: Network
    parties: Mapping[int, ServerParty]  # of this rank's clients, in their order
    num_samples: Mapping[int, Mapping[str, int]]  # of all clients, in their order
    backs: Mapping[int, Segments]  # the copies of the server's segments
    split: SplitModel
    archive: ArchiveWriter
    log: RoundLog
    seen: RoundsSeen
    shared: dict[str, Shared]  # weights at the start of the next round, of this server's segments
    store: Callable[[Link], WeightStore]  # makes a client's store for its link
    spool: Spool
    payloads: MakeStore  # makes the store of clients' incoming payloads
    about: Mapping[str, Any]  # further content of a checkpoint
    check_there: Callable[[], None]  # raises RunError if the run's folder is gone
    check_space: Callable[[], None]  # raises RunError if the disk has no space for another round
    joint_steps: JointSteps[Cut] | None = None  # if clients take their steps together
    first_round: int = 0
    may_skip: bool = False
    fewest: int = 1  # clients with which a round can be merged
    at_once: int = 0  # most clients that train at the same time, each with a copy; 0: all
    ranks: Ranks = field(default_factory=OneRank)
    plan: RoundPlan | None = None  # of this round
    _start_shared: Mapping[str, Shared] = field(default_factory=dict)  # at this round's start
    _missing: dict[int, str] = field(default_factory=dict)  # clients absent in the round, and why
    _optimizers: dict[int, Mapping[str, Snapshot]] = field(default_factory=dict)  # at its start
    _paths: list[str] = field(default_factory=list)  # files that the next round starts from

    @property
    def recipe(self) -> Recipe:
        return self.split.recipe

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    def run_all(self) -> dict[str, float]:
        """Run all remaining rounds; return the metrics of the last one."""
        if self.first_round == 0:
            self._write_shared(-1)
            self._commit(0)
            self.archive.wait_committed()
            self.ranks.gather({})  # no rank takes a step before all can resume
        num_rounds = self.first_round
        while not self.seen.is_over(num_rounds):
            self._round(num_rounds)
            num_rounds += 1
        if why := self.seen.why_stopped:
            self.log.say_of_run(f"{RUN_STOPS}{num_rounds}/{self.run.rounds}: {why}")
        if told := self.seen.told_best:
            self.log.say_of_run(told)
        self.archive.wait_committed()
        self.check_there()
        crash_point("run.before_goodbye")
        self.ranks.gather({})  # no rank lets clients go before all have the last checkpoint
        figures = self.log.figures
        self.network.end_soon()
        self._run_clients(
            self._active(),
            lambda k: self._goodbye(k, figures, num_rounds),
            may_leave=lambda client: True,
        )
        crash_point("run.after_goodbye")
        return figures

    def reconnect(self, joined: Joined) -> None:
        """Use a client's new connection from now on, with the counters of the old one."""
        party = self.parties[joined.client]
        party.link.counters.add(joined.link.counters)
        joined.link.counters = party.link.counters
        party.link, party.weights = joined.link, self.store(joined.link)
        party.ready_for_round = party.trained_round = -1
        self.set_limits(joined.client)

    def set_limits(self, client: int) -> None:
        """Set the limits of a client's connection for this run."""
        split = self.parties[client].split
        limits = server_limits(split, self.num_steps[client], self.payloads)
        self.parties[client].link.limits = limits

    def _items(self) -> ItemsView[int, ServerParty]:
        return self.parties.items()

    def _active(self) -> list[int]:
        """Return the clients that are connected or waited for."""
        return [k for k in self.parties if not self.network.is_skipped(k)]

    def _run_clients(
        self,
        clients: Iterable[int],
        conversation: Callable[[int], Conversation[T]],
        on_leave: Callable[[int], None] | None = None,
        *,
        may_leave: Callable[[int], bool] | None = None,
        keep_results: bool = True,
    ) -> dict[int, T]:
        """Run one conversation per client, concurrently."""
        beginnings = {k: functools.partial(conversation, k) for k in clients}
        leave = on_leave or self._skip
        return run_together(
            self.network, beginnings, leave, may_leave=may_leave or self.recipe.may_leave,
            keep_results=keep_results,
        )  # fmt: skip

    def _skip(self, client: int) -> None:
        """Continue without a client, in this round and until it returns."""
        self._missing[client] = self.network.why_away(client)
        if self.joint_steps:
            self.joint_steps.drop(client)
        self.log.say(f"going on without client_{client}: {self._missing[client]}")

    def _round(self, round_index: int) -> dict[str, float]:
        """Run one round and return its metrics."""
        self.check_there()
        self.check_space()
        started = time.perf_counter()
        self.network.start_round(round_index)
        for party in self.parties.values():
            party.start_round(started)
        self._missing = {k: self.network.why_away(k) for k in self.parties.keys() - self._active()}
        self._start_shared = self.shared
        self._run_clients(self._active(), lambda k: self._start(k, round_index))
        before = {k: party.link.counters.copy() for k, party in self._items()}
        plan, trained = self._train(round_index)
        while not plan.order:  # all participants have left: restart the round with those present
            self.network.wait_for_client()
            self._reset_round(round_index)
            plan, trained = self._train(round_index)
        # Stay at most one round ahead of the last commit, as all ranks do: clients keep two rounds'
        # own state, and ranks two checkpoints.
        self.archive.wait_committed()
        self.log.add_steps(self.ranks.gather(self.log.steps_so_far()))
        self._merge(round_index, plan, trained)
        tallies = self._evaluate(round_index, plan)
        crash_point("validation.after")
        overall = self.log.train_figures() | evaluated_figures(self.recipe.task, tallies)
        # The clients that have evaluated all parts.
        ended = [k for k in [*tallies.values()][-1] if k in self.parties]
        for k in ended:
            at = self.parties[k].at(round_index)
            with contextlib.suppress(*PEER_ERRORS):  # a lost client is noticed in the next round
                self.parties[k].link.send_message_as_json(
                    MessageType.VALIDATION_DONE, content=overall, at=at
                )
        crash_point("round.told")
        clients = {
            k: client_figures(party, before[k], trained.get(k), tallies)
            for k, party in self._items()
        }
        for k in ended:  # a client that has evaluated has saved its own state
            self.parties[k].own_round = round_index + 1
        clients = self.ranks.gather(clients)
        overall |= sums(clients)
        overall["seconds"] = time.perf_counter() - started
        self.log.end_round(round_index, clients, overall, plan.order, self._missing, self._states())
        self.archive.end_round(round_index)
        self._commit(round_index + 1)
        return overall

    def _start(self, client: int, round_index: int) -> Conversation[None]:
        """Send a client the weights at the round's start, unless it has them."""
        if self.parties[client].ready_for_round == round_index:
            return
        front, keeps_own = None, self.recipe.scheme.fronts is Fronts.OWN
        has_own = keeps_own and (round_index > 0 or self.recipe.joins)
        if not self.seen.is_over(round_index) and not has_own:
            # Those of the round's start, even after its merge; empty if a fed server has them.
            front = NamedWeights(INITIAL, front_file(self.split, self._start_shared))
        yield from server_start(self.parties[client], front, round_index)

    def _goodbye(
        self, client: int, figures: dict[str, float], num_rounds: int
    ) -> Conversation[None]:
        yield from self._start(client, num_rounds)
        yield from server_goodbye(self.parties[client], figures, num_rounds)

    def _reset_round(self, round_index: int) -> None:
        """Restore the server's state at the round's start, after all participants have left."""
        for b, copy in self.backs.items():
            copy.load(self._states())
            if self.recipe.training.keeps_optimizer:
                copy.restore(self._optimizers[b])
        for k in self.parties:
            self.archive.drop_steps(k, round_index)
            self.log.forget(k)

    def _train(self, round_index: int) -> tuple[RoundPlan, dict[int, RoundResult]]:
        """Train with the round's clients; all copies of the back start with the same weights."""
        for b, copy in self.backs.items():
            copy.start_round(round_index)
            if self.may_skip and self.recipe.training.keeps_optimizer:
                self._optimizers[b] = copy.snapshot(weights=False)
        self.spool.start_round()
        away = self.parties.keys() - self._active()
        num_steps = {k: n for k, n in self.num_steps.items() if k not in away}
        plan = RoundPlan(
            self.recipe, round_index, num_steps, self.backs,
            spool=self.spool, may_skip=self.may_skip, at_once=self.at_once,
        )  # fmt: skip
        self.plan = plan
        if self.joint_steps:
            self.joint_steps.start(plan.order)
        self.log.start_round(round_index, plan.num_own_steps(self.parties))
        for party in self.parties.values():
            party.compute_s = 0.0

        def leave(client: int) -> None:
            self._skip(client)
            if plan.drop(client):
                self.archive.drop_steps(client, round_index)
                self.log.forget(client)

        def may_leave(client: int) -> bool:
            return self.recipe.may_leave(client) and (
                self.fewest == 1 or len(plan.order) > self.fewest
            )

        drawn = [k for k in plan.order if k in self.parties]
        for k in drawn:  # a client may have returned while the round began
            self._missing.pop(k, None)
        told = self.parties if self.recipe.tasks.names else drawn  # a task's server waits for all
        found = self._run_clients(
            told, lambda k: self._train_one(k, plan, round_index), leave, may_leave=may_leave,
            keep_results=not self.recipe.has_hops,  # a hop that comes back repeats all steps
        )  # fmt: skip
        for k in sorted(plan.mismatched):
            self.log.say(
                f"warning: client_{k} has sent other activations than before when it redid its"
                " steps: it computes other last bits now, or has other data"
            )
        return plan, {k: result for k, result in found.items() if result}

    def _train_one(
        self, client: int, plan: RoundPlan, round_index: int
    ) -> Conversation[RoundResult | None]:
        yield from self._start(client, round_index)
        if client not in plan.order:
            return None  # it is told the round alone
        return (yield from server_train(self.parties[client], plan, round_index))

    @property
    def num_steps(self) -> dict[int, int]:
        """Each client's steps in a round, of all ranks."""
        run, counts = self.run, self.num_samples
        one = {k: num_batches(counts[k][TRAIN], run.batch_size) for k in counts}
        return {k: count * run.local_epochs for k, count in one.items()}

    def _merge(self, round_index: int, plan: RoundPlan, trained: Mapping[int, RoundResult]) -> None:
        """Merge the round's trained weights into the shared ones, and record both."""
        by_client = {k: result.states for k, result in sorted(trained.items())}
        for k, states in by_client.items():
            for name, state in states.items():
                path = segment_path(ONE_CLIENT_MODEL, name, round_index, client=k)
                self.archive.write("one_client_model", path, encode_state(state), round_index)
        num_train = {k: self.num_samples[k][TRAIN] for k in sorted(plan.order)}
        by_copy = {b: copy.states() for b, copy in self.backs.items()}
        weights = averaging_weights(self.run, num_train)
        crash_point("average.before")
        made = Trained(by_client, by_copy, weights, last=plan.order[-1], ranks=self.ranks)
        shared = merge(self.recipe, self.shared, made, self.split.entries)
        in_process = any(party.link.in_process for party in self.parties.values())
        if self.run.on_nonfinite == REJECT and not in_process:
            check_merged(shared, self.split, round_index)
        self.shared = shared
        crash_point("average.after")
        self._write_shared(round_index)
        for copy in self.backs.values():
            copy.load(self._states())

    def _states(self) -> States:
        return {name: shared.state for name, shared in self.shared.items()}

    def _write_shared(self, round_index: int) -> None:
        """Record the shared weights and the server's optimisers for the next round's start."""
        files = [f for item in self.shared.items() for f in shared_files(*item, round_index)]
        if self.recipe.training.keeps_optimizer and round_index >= 0:
            files += optimizer_files(self.backs, round_index)
        for kind, path, data in files:
            self.archive.write(kind, path, data, round_index)
        self._paths = [path for _, path, _ in files]

    def _commit(self, round_index: int) -> None:
        """Queue the checkpoint of a round's start, written when its files are on disk."""
        self.archive.keep_best(self.seen.best.round)
        own = {str(k): party.own_round for k, party in self._items()}
        about = {**self.about, "own": own}
        self.archive.commit(round_index, asdict(self.run), about, self._paths)

    def _evaluate(self, round_index: int, plan: RoundPlan) -> dict[str, dict[int, Tally]]:
        """Evaluate the round's weights on each part of the clients' data that is due.

        Whether the run is over, and so the test part due, may follow from the validation part.
        """
        there = [k for k in self._active() if k not in plan.dropped]
        best = self.seen.best.round  # before this round: the same for all clients and parts
        validated = self._evaluate_part(round_index, plan, VALIDATION, clients=there, best=best)
        tallies = {VALIDATION: validated}
        figures = self.log.train_figures() | evaluated_figures(self.recipe.task, tallies)
        self.seen.see(round_index, figures)
        if self.seen.is_tested(round_index + 1):
            there = [k for k in self._active() if k in validated]
            tested = self._evaluate_part(round_index, plan, TEST, clients=there, best=best)
            tallies[TEST] = tested
        return tallies

    def _evaluate_part(
        self, round_index: int, plan: RoundPlan, part: str, *, clients: Sequence[int], best: int
    ) -> dict[int, Tally]:
        """Evaluate the round's weights at these clients of this rank; return all ranks' tallies.

        A relay's last client has its front.
        """
        front, policy = None, self.recipe.scheme.fronts
        if policy is Fronts.RELAYED:
            front = plan.relayed
        elif policy is Fronts.AVERAGED:
            samples = sum(self.num_samples[k][TRAIN] for k in plan.order)
            front = NamedWeights(AVERAGE, front_file(self.split, self.shared), samples)

        def evaluate(client: int) -> Conversation[Tally]:
            party, has_it = self.parties[client], front and front.name == client_weights(client)
            if party.ready_for_round > round_index:  # it has evaluated another part
                has_it = True
            elif client in plan.order and party.trained_round != round_index:
                yield from self._train_one(client, plan, round_index)
            else:
                yield from self._start(client, round_index)
            given = None if has_it else front
            return (
                yield from server_evaluate_part(party, given, round_index, part=part, best=best)
            )

        if self.joint_steps:
            self.joint_steps.start(clients)
        # A client that starts again may not have its own state of this round on disk.
        own = self._run_clients(clients, evaluate, keep_results=False)
        return self.ranks.gather(own, packed, unpacked)
