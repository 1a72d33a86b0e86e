"""Recompute a recorded run from its files, bit for bit; or train another back on them.

python -m experiments.replay RUN_DIR [--client K] [--round R]
python -m experiments.replay RUN_DIR --train-back --epochs E [--lr LR] [--save FILE]

Every step of the back depends on the round's starting weights, the recorded labels and activations,
and random draws that derive from the seed; so it can be computed again, and its gradients and loss
compared with the recorded ones. At the end of a round the models that it gave are compared as well;
of sync-sgd and fl, whose steps leave no cut-layer tensors, these alone.

Findings are printed, then the closing line. Exit code 0 if everything is equal, else 1.
"""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfl.cli import run_program

if TYPE_CHECKING:
    from experiments.recorded import RecordedRun
    from sfl.archive.reader import Step
    from sfl.files.torch_file import StateSpec
    from sfl.model.segment import Segment
    from sfl.strategy.aggregate import State


@dataclass
class Report:
    """What a replay found."""

    checked: int = 0  # gradients
    differ: int = 0
    unchecked: int = 0  # gradients that rest on a damaged file
    unended: int = 0  # gradients of whose round not all are there, so that no update can be made
    dropped: int = 0  # rounds of which neither tensors nor models were to stay
    models: int = 0  # weights that were computed again
    models_differ: int = 0
    found: dict[str, None] = field(default_factory=dict)  # a line for each file that is not right

    def find(self, finding: object) -> None:
        self.found[str(finding)] = None

    @property
    def findings(self) -> list[str]:
        return list(self.found)

    @property
    def summary(self) -> str:
        return f"{self.checked} gradients checked, {self.differ} differ"


def check(recorded: "RecordedRun", client: int | None = None, round: int | None = None) -> Report:
    """Recompute what was recorded, of one client or round if asked for, and compare.

    Raises:
        RunError: nothing is recorded there.
    """
    from sfl.errors import RunError

    archive, report = recorded.archive, Report()
    _check_listed(recorded, report)
    rounds = set(archive.rounds(client))
    if client is None:  # what a round's halves became is recorded, whether its tensors stay or not
        rounds |= {r for r in range(recorded.run.rounds) if recorded.ended(r)}
    rounds = rounds if round is None else rounds & {round}
    if not rounds:
        raise RunError(f"{archive.root} has nothing recorded of that client and round")
    for round_index in sorted(rounds):
        _check_round(recorded, round_index, client, report)
    return report


def _check_listed(recorded: "RecordedRun", report: Report) -> None:
    """Check the bytes of every model, log, manifest and checkpoint of the run."""
    from sfl.archive.checkpoint import whole
    from sfl.errors import IntegrityError, RunError

    for entry in recorded.archive.listed:
        try:
            recorded.archive.read(entry.path)
        except IntegrityError as error:
            report.find(error)
    damage: list[str] = []
    try:
        list(whole(recorded.archive.root, recorded.run, damage))
    except RunError as error:
        report.find(error)
    for line in damage:
        report.find(line)


def _read_steps(
    recorded: "RecordedRun", round_index: int, client: int | None, broken: set[int], report: Report
) -> "list[Step]":
    """Return the round's steps that the chosen client's back took, in order of processing.

    A back of which a manifest is damaged goes to ``broken``.
    """
    from sfl.errors import IntegrityError

    steps: list[Step] = []
    back_of = recorded.scheme.back_of
    for k in recorded.clients:
        if client is not None and back_of(client) != back_of(k):
            continue
        try:
            steps += recorded.archive.steps(client=k, round=round_index)
        except IntegrityError as error:
            report.find(error)
            broken.add(back_of(k))
    return sorted(steps, key=lambda step: (step.order, step.client))


def _check_round(
    recorded: "RecordedRun", round_index: int, client: int | None, report: Report
) -> None:
    """Recompute a round's steps, and what follows from them, from the round's starting weights."""
    from sfl.errors import IntegrityError
    from sfl.strategy.schemes import Exchange

    broken: set[int] = set()  # the backs whose further steps cannot be computed
    steps = _read_steps(recorded, round_index, client, broken, report)
    backs: dict[int, Segment] = {}
    if not (steps or recorded.has_models(round_index)):
        report.dropped += 1
        return
    if recorded.exchange is not Exchange.NOTHING:
        try:
            backs = recorded.backs_at(round_index)
        except IntegrityError as error:
            report.find(error)
            broken |= {recorded.scheme.back_of(k) for k in recorded.clients}
    if recorded.exchange is Exchange.WEIGHT_GRADS:
        _check_updates(recorded, round_index, backs, steps, report)
        backs = {}
    else:
        _check_steps(recorded, round_index, client, backs, steps, broken, report)
    if not steps:
        backs = {}  # nothing to compute again: what the backs became cannot be known
    if client is None and not broken and recorded.ended(round_index):
        _check_outcome(recorded, round_index, backs, report)


def _check_steps(
    recorded: "RecordedRun",
    round_index: int,
    client: int | None,
    backs: "Mapping[int, Segment]",
    steps: "list[Step]",
    broken: set[int],
    report: Report,
) -> None:
    """Recompute the steps over a cut."""
    from sfl.errors import IntegrityError

    losses = _recorded_losses(recorded, round_index)
    for step in steps:
        b, counts = recorded.scheme.back_of(step.client), client in (None, step.client)
        if b in broken:
            report.unchecked += counts
            continue
        try:
            right = _check_step(recorded, backs[b], step, losses, report)
        except IntegrityError as error:
            report.find(error)
            broken.add(b)
            right = False
        report.checked += counts
        report.differ += counts and not right


def _check_updates(
    recorded: "RecordedRun",
    round_index: int,
    backs: "Mapping[int, Segment]",
    steps: "list[Step]",
    report: Report,
) -> None:
    """Make the updates of a round again, and compare what they gave with what the clients had."""
    from sfl.archive.layout import ONE_CLIENT_MODEL, model_path
    from sfl.archive.spool import Spool
    from sfl.data.client_data import num_batches
    from sfl.errors import IntegrityError
    from sfl.strategy.sync_sgd import GradientPool

    run, order = recorded.run, recorded.order(round_index)
    an_epoch = {k: num_batches(recorded.num_train[k], run.batch_size) for k in order}
    num_steps = Counter(step.client for step in steps)  # fewer for who left in mid-round
    if any(num_steps[k] < count * run.local_epochs for k, count in an_epoch.items()):
        report.unended += len(steps)
        return
    if not backs:
        report.unchecked += len(steps)
        return
    pool = GradientPool(run, backs[0], num_steps, Spool(None, lambda: None))
    try:
        for step in steps:
            grads = step.weight_grads(recorded.split.parameters_spec)
            pool.add(step.client, grads, step.num_samples)
    except IntegrityError as error:
        report.find(error)
        report.unchecked += len(steps)
        return
    for k in order:
        path = model_path(ONE_CLIENT_MODEL, round_index, client=k)
        _compare(recorded, path, backs[0].parameters(), recorded.split.front_spec, report)


def _recorded_losses(
    recorded: "RecordedRun", round_index: int
) -> Mapping[tuple[int, str, str], float]:
    """Return the figures of a round's log; none for a round that did not end, or a damaged log."""
    from sfl.archive.round_log import read_round
    from sfl.errors import IntegrityError

    try:
        return read_round(recorded.archive.read(f"rounds/round_{round_index:03d}.csv"))
    except (IntegrityError, ValueError, KeyError):  # _check_listed names it
        return {}


def _check_step(
    recorded: "RecordedRun",
    back: "Segment",
    step: "Step",
    losses: Mapping[tuple[int, str, str], float],
    report: Report,
) -> bool:
    """Recompute one step; say whether gradients and loss are the recorded ones.

    Raises:
        IntegrityError: its labels or activations are damaged; later steps cannot be computed.
    """
    from sfl.archive.layout import GRADS, LABELS
    from sfl.errors import IntegrityError
    from sfl.files.torch_file import identical
    from sfl.model.segment import train_step
    from sfl.values import Position

    at = Position(recorded.run.run, step.round, step.step, step.client)
    figures, grads = train_step(back, step.activations, step.labels, at)
    back.update()
    name = step.path(LABELS).name
    loss = losses.get((step.client, name, "loss"), figures.loss)
    same_loss = repr(loss) == repr(figures.loss)  # so that NaN is NaN
    if not same_loss:
        report.find(f"{step.path(LABELS)}: its loss differs: {figures.loss!r}, recorded {loss!r}")
    try:
        assert grads is not None
        same_grads = identical(grads.cpu(), step.grads)
    except IntegrityError as error:
        report.find(error)
        return False
    if not same_grads:
        report.find(f"{step.path(GRADS)}: differs from the recomputed gradients")
    return same_grads and same_loss


def _check_outcome(
    recorded: "RecordedRun", round_index: int, backs: "Mapping[int, Segment]", report: Report
) -> None:
    """Compare what both halves were recorded to become with what is computed again."""
    from sfl.archive.layout import CLIENT_MODEL, ONE_CLIENT_MODEL, SERVER_MODEL, model_path
    from sfl.errors import IntegrityError
    from sfl.strategy.merge import BACK, FRONT, merge_backs, merge_fronts
    from sfl.strategy.schemes import Fronts

    split, order = recorded.split, recorded.order(round_index)
    weights, entries = recorded.weights(round_index), split.entries
    try:
        halves = recorded.halves_at(round_index)
        if backs:
            states = {b: back.state() for b, back in backs.items()}
            merged = merge_backs(
                recorded.recipe, states, weights, start=halves[BACK], entries=entries
            )
            path = model_path(SERVER_MODEL, round_index)
            _compare(recorded, path, merged.state, split.back_spec, report)
            _check_memory(recorded, round_index, BACK, merged.memory, report)
        if recorded.scheme.fronts is Fronts.OWN or not recorded.has_fronts:
            return
        paths = {k: model_path(ONE_CLIENT_MODEL, round_index, client=k) for k in order}
        fronts = {k: recorded.archive.state(path, split.front_spec) for k, path in paths.items()}
        front = merge_fronts(
            recorded.recipe, fronts, weights, start=halves[FRONT], entries=entries, last=order[-1]
        )
    except IntegrityError as error:
        report.find(error)
        return
    assert front is not None
    path = model_path(CLIENT_MODEL, round_index)
    _compare(recorded, path, front.state, split.front_spec, report)
    _check_memory(recorded, round_index, FRONT, front.memory, report)


def _check_memory(
    recorded: "RecordedRun", round_index: int, half: str, memory: "State", report: Report
) -> None:
    """Compare what an aggregation rule keeps of a half for the next round."""
    from sfl.archive.layout import MEMORY, model_path
    from sfl.files.torch_file import state_spec

    if memory:
        path = model_path(MEMORY, round_index, half=half)
        _compare(recorded, path, memory, state_spec(memory), report)


def _compare(
    recorded: "RecordedRun", path: str, ours: "State", spec: "StateSpec", report: Report
) -> None:
    """Compare weights computed again, some or all of a file's, with the recorded ones."""
    from sfl.errors import IntegrityError
    from sfl.files.torch_file import identical

    report.models += 1
    try:
        theirs = recorded.archive.state(path, spec)
    except IntegrityError as error:
        report.find(error)
        report.models_differ += 1
        return
    if not all(identical(tensor, theirs[name]) for name, tensor in ours.items()):
        report.find(f"{recorded.archive.root / path}: differs from what the run's files give")
        report.models_differ += 1


def parse() -> Namespace:
    from sfl.options import Parser

    parser = Parser(prog="python -m experiments.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="shared_files/server/<run>")
    parser.add_argument("--client", type=int, metavar="K", help="this client's steps only")
    parser.add_argument("--round", type=int, metavar="R", help="this round only")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the run's, if not given")
    parser.add_argument("--threads", type=int, help="the run's, if not given")
    parser.add_argument(
        "--allow-import",
        default="",
        help="package.module:function that the run may import as model",
    )
    offline = parser.add_argument_group("train another back")
    offline.add_argument("--train-back", action="store_true", help="on the recorded activations")
    offline.add_argument("--epochs", type=int, default=5, help="passes over them (default: 5)")
    offline.add_argument("--lr", type=float, help="the run's, if not given")
    offline.add_argument("--optimizer", help="the run's, if not given")
    offline.add_argument("--seed", type=int, help="the run's, if not given")
    offline.add_argument("--save", metavar="FILE", help="write the trained back there")
    return parser.parse_args()


def main() -> int:
    from experiments.offline import train_back
    from experiments.recorded import load
    from sfl.errors import counted

    options = parse()
    recorded = load(options.run_dir, options.device, options.threads, options.allow_import)
    if options.train_back:
        train_back(recorded, options)
        return 0
    report = check(recorded, options.client, options.round)
    for finding in report.findings:
        print(finding)
    if report.unchecked:
        print(f"{report.unchecked} gradients rest on a damaged file and were not checked")
    if report.unended:
        print(f"{report.unended} gradients are of rounds of which not all are recorded")
    if report.dropped:
        print(f"{counted(report.dropped, 'round')} left nothing to check, as --keep-models has it")
    print(f"{report.models} models checked, {report.models_differ} differ")
    print(report.summary)
    return 1 if report.findings or report.differ else 0


if __name__ == "__main__":
    sys.exit(run_program("replay", main))
