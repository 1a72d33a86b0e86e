"""Recompute a recorded run from its files, and compare it bit for bit.

    from sfl.runtime.recorded_run import load
    from sfl.runtime.replay import check

    report = check(load("shared_files/server/first"))
    print(*report.findings, report.summary, sep="\\n")  # ..., N gradients checked, 0 differ

A step of the back follows from the round's starting weights, the recorded labels and activations,
and random draws that derive from the seed: its gradients and loss are recomputed and compared with
the recorded ones, and so are the models at the end of each round. Steps of schemes without a cut
leave no cut-layer tensors: only their models are compared.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from sfl.archive.checkpoint import valid_checkpoints
from sfl.archive.layout import (
    ACTIVATIONS,
    GRADS,
    LABELS,
    MEMORY,
    ONE_CLIENT_MODEL,
    SHARED_MODEL,
    segment_path,
)
from sfl.archive.reader import Step
from sfl.archive.round_log import read_round
from sfl.archive.spool import Spool
from sfl.conversation.cut import own_transfers
from sfl.conversation.passes import train_pass
from sfl.data.client_data import num_batches
from sfl.errors import IntegrityError, RunError
from sfl.files.torch_file import StateSpec, identical, state_spec
from sfl.model.topology import Holder, Segments, States, route
from sfl.runtime.recorded_run import RecordedRun
from sfl.runtime.recorded_step import RecordedEnds, RecordedServer
from sfl.strategy.aggregate import State
from sfl.strategy.merge import Trained, merge
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.sync_sgd import GradientPool
from sfl.values import Position
from sfl.wire.driver import run_blocking

_NAMES = {ACTIVATIONS: "activations", GRADS: "gradients"}
Losses = Mapping[tuple[int, str, str], float]  # by client, file and metric
Backs = Mapping[int, Segments]  # the copies of the server's segments


@dataclass
class Report:
    """The result of a replay."""

    checked: int = 0  # gradients
    differ: int = 0
    unchecked: int = 0  # gradients that depend on a damaged file
    incomplete: int = 0  # gradients of rounds that lack some, so that the update is unknown
    dropped: int = 0  # rounds of which neither tensors nor models were kept
    models: int = 0  # files of weights that were recomputed
    models_differ: int = 0
    found: dict[str, None] = field(default_factory=dict)  # one line for each damaged or wrong file

    def add(self, finding: object) -> None:
        self.found[str(finding)] = None

    @contextmanager
    def reporting(self, error_type: type[Exception] = IntegrityError) -> Iterator[None]:
        """Report an error raised in the ``with`` block, and continue after it."""
        try:
            yield
        except error_type as error:
            self.add(error)

    @property
    def findings(self) -> list[str]:
        return list(self.found)

    @property
    def summary(self) -> str:
        return f"{self.checked} gradients checked, {self.differ} differ"


def check(recorded: RecordedRun, client: int | None = None, round: int | None = None) -> Report:
    """Recompute and compare a recorded run, or one client or round of it.

    Raises:
        RunError: nothing is recorded of that client and round.
    """
    archive, report = recorded.archive, Report()
    _check_listed(recorded, report)
    rounds = set(archive.rounds(client))
    if client is None:  # the models of a round may be recorded without its tensors
        rounds |= {r for r in range(recorded.run.rounds) if recorded.ended(r)}
    rounds = rounds if round is None else rounds & {round}
    if not rounds:
        raise RunError(f"{archive.root} has nothing recorded of that client and round")
    for round_index in sorted(rounds):
        _Round(recorded, round_index, client, report).check()
    return report


def _check_listed(recorded: RecordedRun, report: Report) -> None:
    """Check the bytes of every model, log, manifest and checkpoint of the run."""
    damage: list[str] = []
    for archive in (recorded.archive, *recorded.archive.shares):
        for entry in archive.listed:
            with report.reporting():
                archive.read(entry.path)
        with report.reporting(RunError):
            list(valid_checkpoints(archive.root, recorded.run, damage))
    for line in damage:
        report.add(line)


class _Round:
    """Replays one round: its steps and its resulting models, from its starting weights."""

    def __init__(
        self, recorded: RecordedRun, round_index: int, client: int | None, report: Report
    ) -> None:
        self._recorded, self._round, self._client = recorded, round_index, client
        self._report = report
        self._broken: set[int] = set()  # backs whose remaining steps cannot be recomputed

    def check(self) -> None:
        recorded = self._recorded
        steps = self._read_steps()
        if not (steps or recorded.has_models(self._round)):
            self._report.dropped += 1
            return
        backs = self._starting_backs()
        if recorded.exchange is Exchange.WEIGHT_GRADS:
            self._check_updates(backs, steps)
        else:
            self._check_steps(backs, steps)
        is_whole = self._client is None and recorded.is_whole
        if is_whole and not self._broken and recorded.ended(self._round):
            # Without recorded steps, or with pooled gradients, the backs are not recomputed here.
            has_results = steps and recorded.exchange is not Exchange.WEIGHT_GRADS
            self._check_outcome(backs if has_results else {})

    def _read_steps(self) -> list[Step]:
        """Return the steps of the chosen client's back, in the order in which it took them."""
        recorded, back_of = self._recorded, self._recorded.scheme.back_of
        steps: list[Step] = []
        for k in recorded.clients:
            if self._client is not None and back_of(self._client) != back_of(k):
                continue
            try:
                steps += recorded.archive.steps(client=k, round=self._round)
            except IntegrityError as error:
                self._report.add(error)
                self._broken.add(back_of(k))
        return sorted(steps, key=lambda step: (step.order, step.client, step.link))

    def _starting_backs(self) -> Backs:
        """Return the backs at the round's start; none without a server's model or if damaged."""
        recorded = self._recorded
        if recorded.exchange is not Exchange.NOTHING:
            with self._report.reporting():
                return recorded.backs_at(self._round)
            self._broken |= {recorded.scheme.back_of(k) for k in recorded.clients}
        return {}

    def _check_steps(self, backs: Backs, steps: list[Step]) -> None:
        """Recompute all steps of a scheme with a cut."""
        losses, report, leader = self._recorded_losses(), self._report, self._recorded.recipe.leader
        by_step = itertools.groupby(steps, key=lambda step: (step.order, leader(step.client)))
        for (_, client), of_step in by_step:
            b, ends = self._recorded.scheme.back_of(client), list(of_step)
            counts = len({s.client for s in ends if self._client in (None, s.client)})
            if b in self._broken:
                report.unchecked += counts
                continue
            if self._is_broken_off(client, ends):
                report.incomplete += counts
                continue
            different = {client}
            try:
                different = self._check_step(backs[b], client, ends, losses)
            except IntegrityError as error:
                report.add(error)
                self._broken.add(b)
            report.checked += counts
            report.differ += len([k for k in different if self._client in (None, k)])

    def _is_broken_off(self, leader: int, ends: Sequence[Step]) -> bool:
        """Return whether a step lacks a cut, since the run was killed while it was written."""
        recorded = self._recorded
        due = own_transfers(route(recorded.recipe.segments, recorded.holder))
        links = {step.link for step in ends if step.client == leader}
        present = {step.client for step in ends}
        joins = recorded.recipe.joins_at(recorded.holder)
        wanted = set(recorded.order(self._round)) if joins else {leader}
        is_whole = {t.link for t in due} <= links and wanted <= present
        return not recorded.ended(self._round) and not is_whole

    def _check_step(
        self, back: Segments, leader: int, recorded: Sequence[Step], losses: Losses
    ) -> set[int]:
        """Recompute one step; return the clients whose tensors or loss differ from the recorded.

        Raises:
            IntegrityError: what was received is damaged, so that later steps are unknown.
        """
        report = self._report
        first = next((step for step in recorded if step.client == leader), recorded[0])
        at = Position(self._recorded.run.run, first.round, first.step, leader)
        different: set[int] = set()

        def compare(step: Step, kind: str, tensor: Tensor) -> None:
            same = False
            with report.reporting():
                same = identical(tensor.detach().cpu(), step.tensor(kind))
                if not same:
                    report.add(f"{step.path(kind)}: differs from the recomputed {_NAMES[kind]}")
            if not same:
                different.add(step.client)

        side = RecordedServer(self._recorded, back)
        joins = self._recorded.recipe.joins_at(self._recorded.holder)
        ends = RecordedEnds(at, recorded, compare, self._recorded.split.joint if joins else None)
        y = first.labels if side.computes_loss else None
        figures, _ = run_blocking(train_pass(side, ends, None, y))
        back.update_weights()
        if figures is None:  # a client has computed the loss
            return different
        labels = first.path(LABELS)
        loss = losses.get((first.client, labels.name, "loss"), figures.loss)
        same_loss = repr(loss) == repr(figures.loss)  # NaN equals NaN
        if not same_loss:
            report.add(f"{labels}: its loss differs: {figures.loss!r}, recorded {loss!r}")
        return different if same_loss else different | {first.client}

    def _recorded_losses(self) -> Losses:
        """Return the round's log; empty if the round was not completed or the log is damaged."""
        try:
            log = self._recorded.archive.read(f"rounds/round_{self._round:03d}.csv")
            return read_round(log)
        except (IntegrityError, ValueError, KeyError):  # reported by _check_listed
            return {}

    def _check_updates(self, backs: Backs, steps: list[Step]) -> None:
        """Recompute the round's pooled updates, and compare the weights with the clients'."""
        recorded, run, report = self._recorded, self._recorded.run, self._report
        order = recorded.order(self._round)
        steps_per_epoch = {k: num_batches(recorded.num_train[k], run.batch_size) for k in order}
        num_steps = Counter(step.client for step in steps)  # fewer for a client lost in the round
        if any(num_steps[k] < count * run.local_epochs for k, count in steps_per_epoch.items()):
            report.incomplete += len(steps)
            return
        if not backs:
            report.unchecked += len(steps)
            return
        ((name, model),) = backs[0].items()
        pool = GradientPool(run, model, num_steps, Spool(None, lambda: None))
        try:
            for step in steps:
                grads = step.weight_grads(recorded.split.parameters_spec)
                pool.add(step.client, grads, step.num_samples)
        except IntegrityError as error:
            report.add(error)
            report.unchecked += len(steps)
            return
        for k in order:
            path = segment_path(ONE_CLIENT_MODEL, name, self._round, client=k)
            self._compare(path, model.parameters(), recorded.split.specs[name])

    def _check_outcome(self, backs: Backs) -> None:
        """Recompute the round's resulting weights of each segment, and compare them."""
        recorded = self._recorded
        with self._report.reporting():
            if backs:
                by_copy = {b: copy.states() for b, copy in backs.items()}
                self._check_merged(recorded.holder, {}, by_copy)
            if recorded.scheme.fronts is not Fronts.OWN and recorded.leads:
                self._check_merged(Holder.CLIENT, recorded.trained_states(self._round), {})

    def _check_merged(
        self, holder: Holder, by_client: Mapping[int, States], by_copy: Mapping[int, States]
    ) -> None:
        recorded, split = self._recorded, self._recorded.split
        names = [name for name in recorded.segments if split.recipe.segments[name] is holder]
        start, last = recorded.shared_at(self._round), recorded.order(self._round)[-1]
        trained = Trained(by_client, by_copy, recorded.weights(self._round), last)
        merged = merge(recorded.recipe, {n: start[n] for n in names}, trained, split.entries)
        for name, shared in merged.items():
            path = segment_path(SHARED_MODEL, name, self._round)
            self._compare(path, shared.state, split.specs[name])
            if shared.memory:
                path = segment_path(MEMORY, name, self._round)
                self._compare(path, shared.memory, state_spec(shared.memory))

    def _compare(self, path: str, ours: State, spec: StateSpec) -> None:
        """Compare recomputed weights, all of a file's or some, with the recorded ones."""
        archive, report = self._recorded.archive, self._report
        report.models += 1
        same = False
        with report.reporting():
            theirs = archive.state(path, spec)
            same = all(identical(tensor, theirs[name]) for name, tensor in ours.items())
            if not same:
                report.add(f"{archive.root / path}: differs from what the run's files give")
        report.models_differ += not same
