"""Recompute a recorded run from its files, and compare it bit for bit.

    from sfl.runtime.recorded_run import load
    from sfl.runtime.replay import check

    report = check(load("shared_files/server/first"))
    print(*report.findings, report.summary, sep="\\n")  # ..., N gradients checked, 0 differ

A step of the back follows from the round's starting weights, the recorded labels and activations,
and random draws that derive from the seed: its gradients and its loss are computed again and
compared with the recorded ones. So are the models at the end of each round; of schemes without a
cut, whose steps leave no cut-layer tensors, these alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from sfl.archive.checkpoint import valid_checkpoints
from sfl.archive.layout import (
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
from sfl.data.client_data import num_batches
from sfl.errors import IntegrityError, RunError
from sfl.files.torch_file import StateSpec, identical, state_spec
from sfl.model.segment import Segment, train_step
from sfl.model.topology import HOLDERS, Holder, Segments, States
from sfl.runtime.recorded_run import RecordedRun
from sfl.strategy.aggregate import State
from sfl.strategy.merge import Trained, merge
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.sync_sgd import GradientPool
from sfl.values import Position

Losses = Mapping[tuple[int, str, str], float]  # by client, file and metric
Backs = Mapping[int, Segments]  # the copies of the server's segments


@dataclass
class Report:
    """What a replay found."""

    checked: int = 0  # gradients
    differ: int = 0
    unchecked: int = 0  # gradients that rest on a damaged file
    unended: int = 0  # gradients of rounds that lack some, so that no update can be made
    dropped: int = 0  # rounds of which neither tensors nor models were kept
    models: int = 0  # weights that were computed again
    models_differ: int = 0
    found: dict[str, None] = field(default_factory=dict)  # a line for each file that is not right

    def find(self, finding: object) -> None:
        self.found[str(finding)] = None

    @contextmanager
    def finding(self, error_type: type[Exception] = IntegrityError) -> Iterator[None]:
        """Report an error of what is done meanwhile, and go on."""
        try:
            yield
        except error_type as error:
            self.find(error)

    @property
    def findings(self) -> list[str]:
        return list(self.found)

    @property
    def summary(self) -> str:
        return f"{self.checked} gradients checked, {self.differ} differ"


def check(recorded: RecordedRun, client: int | None = None, round: int | None = None) -> Report:
    """Recompute what was recorded, of one client or round if asked for, and compare.

    Raises:
        RunError: nothing is recorded there.
    """
    archive, report = recorded.archive, Report()
    _check_listed(recorded, report)
    rounds = set(archive.rounds(client))
    if client is None:  # a round's results are recorded even if its tensors are not
        rounds |= {r for r in range(recorded.run.rounds) if recorded.ended(r)}
    rounds = rounds if round is None else rounds & {round}
    if not rounds:
        raise RunError(f"{archive.root} has nothing recorded of that client and round")
    for round_index in sorted(rounds):
        _Round(recorded, round_index, client, report).check()
    return report


def _check_listed(recorded: RecordedRun, report: Report) -> None:
    """Check the bytes of every model, log, manifest and checkpoint of the run."""
    for entry in recorded.archive.listed:
        with report.finding():
            recorded.archive.read(entry.path)
    damage: list[str] = []
    with report.finding(RunError):
        list(valid_checkpoints(recorded.archive.root, recorded.run, damage))
    for line in damage:
        report.find(line)


class _Round:
    """One round: its steps, and what follows from them, from the round's starting weights."""

    def __init__(
        self, recorded: RecordedRun, round_index: int, client: int | None, report: Report
    ) -> None:
        self._recorded, self._round, self._client = recorded, round_index, client
        self._report = report
        self._broken: set[int] = set()  # backs whose further steps cannot be computed

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
        if self._client is None and not self._broken and recorded.ended(self._round):
            # Without its steps, and where updates are pooled, no back's result is recomputed.
            has_results = steps and recorded.exchange is not Exchange.WEIGHT_GRADS
            self._check_outcome(backs if has_results else {})

    def _read_steps(self) -> list[Step]:
        """Return the steps that the chosen client's back took, in order of processing."""
        recorded, back_of = self._recorded, self._recorded.scheme.back_of
        steps: list[Step] = []
        for k in recorded.clients:
            if self._client is not None and back_of(self._client) != back_of(k):
                continue
            try:
                steps += recorded.archive.steps(client=k, round=self._round)
            except IntegrityError as error:
                self._report.find(error)
                self._broken.add(back_of(k))
        return sorted(steps, key=lambda step: (step.order, step.client))

    def _starting_backs(self) -> Backs:
        """Return the backs at the round's start; none if there are none or they are damaged."""
        recorded = self._recorded
        if recorded.exchange is not Exchange.NOTHING:
            with self._report.finding():
                return recorded.backs_at(self._round)
            self._broken |= {recorded.scheme.back_of(k) for k in recorded.clients}
        return {}

    def _check_steps(self, backs: Backs, steps: list[Step]) -> None:
        """Recompute the steps over a cut."""
        losses, report = self._recorded_losses(), self._report
        for step in steps:
            b = self._recorded.scheme.back_of(step.client)
            counts = self._client in (None, step.client)
            if b in self._broken:
                report.unchecked += counts
                continue
            right = False
            try:
                right = self._check_step(backs[b].last, step, losses)
            except IntegrityError as error:
                report.find(error)
                self._broken.add(b)
            report.checked += counts
            report.differ += counts and not right

    def _check_step(self, back: Segment, step: Step, losses: Losses) -> bool:
        """Recompute one step; say whether gradients and loss are the recorded ones.

        Raises:
            IntegrityError: its labels or activations are damaged; later steps cannot be computed.
        """
        report, labels = self._report, step.path(LABELS)
        at = Position(self._recorded.run.run, step.round, step.step, step.client)
        figures, grads = train_step(back, step.activations, step.labels, at)
        assert grads is not None
        back.update()
        loss = losses.get((step.client, labels.name, "loss"), figures.loss)
        same_loss = repr(loss) == repr(figures.loss)  # NaN equals NaN
        if not same_loss:
            report.find(f"{labels}: its loss differs: {figures.loss!r}, recorded {loss!r}")
        with report.finding():
            same_grads = identical(grads.cpu(), step.grads)
            if not same_grads:
                report.find(f"{step.path(GRADS)}: differs from the recomputed gradients")
            return same_grads and same_loss
        return False

    def _recorded_losses(self) -> Losses:
        """Return the figures of the round's log; none if it did not end or the log is damaged."""
        try:
            log = self._recorded.archive.read(f"rounds/round_{self._round:03d}.csv")
            return read_round(log)
        except (IntegrityError, ValueError, KeyError):  # _check_listed names it
            return {}

    def _check_updates(self, backs: Backs, steps: list[Step]) -> None:
        """Make the round's updates again, and compare their weights with the clients'."""
        recorded, run, report = self._recorded, self._recorded.run, self._report
        order = recorded.order(self._round)
        an_epoch = {k: num_batches(recorded.num_train[k], run.batch_size) for k in order}
        num_steps = Counter(step.client for step in steps)  # fewer for who left in mid-round
        if any(num_steps[k] < count * run.local_epochs for k, count in an_epoch.items()):
            report.unended += len(steps)
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
            report.find(error)
            report.unchecked += len(steps)
            return
        for k in order:
            path = segment_path(ONE_CLIENT_MODEL, name, self._round, client=k)
            self._compare(path, model.parameters(), recorded.split.specs[name])

    def _check_outcome(self, backs: Backs) -> None:
        """Compare what the round gave, of each segment, with what is computed again."""
        recorded = self._recorded
        with self._report.finding():
            if backs:
                by_copy = {b: copy.states() for b, copy in backs.items()}
                self._check_merged(Holder.SERVER, {}, by_copy)
            if recorded.scheme.fronts is not Fronts.OWN:
                self._check_merged(Holder.CLIENT, recorded.trained_states(self._round), {})

    def _check_merged(
        self, holder: Holder, by_client: Mapping[int, States], by_copy: Mapping[int, States]
    ) -> None:
        recorded, split = self._recorded, self._recorded.split
        names = [name for name in recorded.segments if HOLDERS[name] is holder]
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
        """Compare weights computed again, some or all of a file's, with the recorded ones."""
        archive, report = self._recorded.archive, self._report
        report.models += 1
        same = False
        with report.finding():
            theirs = archive.state(path, spec)
            same = all(identical(tensor, theirs[name]) for name, tensor in ours.items())
            if not same:
                report.find(f"{archive.root / path}: differs from what the run's files give")
        report.models_differ += not same
