"""Recompute a recorded run from its files, bit for bit; or train another back on them.

python -m experiments.replay RUN_DIR [--client K] [--round R]
python -m experiments.replay RUN_DIR --train-back --epochs E [--lr LR] [--save FILE]

Every step of the back depends on the round's starting weights, the recorded labels and activations,
and random draws that derive from the seed; so it can be computed again, and its gradients and loss
compared with the recorded ones. At the end of a round the averages are compared as well.

Findings are printed, then the closing line. Exit code 0 if everything is equal, else 1.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.cli import run_program

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sfl.archive import RunArchive, Step
    from sfl.segment import Segment


@dataclass
class Report:
    """What a replay found."""

    checked: int = 0  # gradients
    differ: int = 0
    unchecked: int = 0  # gradients that rest on a damaged file
    found: dict[str, None] = field(default_factory=dict)  # a line for each file that is not right

    def find(self, finding: object) -> None:
        self.found[str(finding)] = None

    @property
    def findings(self) -> list[str]:
        return list(self.found)

    @property
    def summary(self) -> str:
        return f"{self.checked} gradients checked, {self.differ} differ"


class RecordedRun:
    """A run's folder, with what is needed to compute with it.

    Raises:
        IntegrityError: its configuration is damaged.
        ConfigError: its model is a user's own that cannot be imported.
    """

    def __init__(self, archive: "RunArchive", device: "torch.device") -> None:
        from sfl.config import RunConfig
        from sfl.options import from_values, names_of
        from sfl.party import TRAIN
        from sfl.rounds import averaging_weights
        from sfl.schemes import scheme
        from sfl.split_model import SplitModel

        self.archive = archive
        self.device = device
        options = {n: v for n, v in archive.config().items() if n in names_of(RunConfig)}
        self.run = from_values(RunConfig, options, str(archive.root / "config.json"))
        data = archive.environment()["data"]
        self.split = SplitModel(self.run, tuple(data["input_shape"]), len(data["classes"]))
        counts = {int(k): parts[TRAIN] for k, parts in data["num_samples"].items()}
        self.weights = averaging_weights(self.run, counts)
        self.back_of = scheme(self.run.scheme).back_of

    def backs_at(self, round_index: int) -> "dict[int, Segment]":
        """Return the copies of the back as they were when a round began."""
        from sfl.rounds import SERVER_MODEL, SERVER_OPTIMIZER, model_path

        path = model_path(SERVER_MODEL, round_index - 1)
        start = self.archive.state(path, self.split.back_spec)
        backs = {b: self.split.back(self.device) for b in map(self.back_of, self.weights)}
        for b, back in backs.items():
            back.load(start)
            if self.run.optimizer_state == "keep" and round_index > 0:
                path = model_path(SERVER_OPTIMIZER, round_index - 1, back=b)
                back.load_optimizer_state(self.archive.state(path, back.optimizer_spec()))
        return backs


def check(recorded: RecordedRun, client: int | None = None, round: int | None = None) -> Report:
    """Recompute the recorded steps, of one client or round if asked for, and compare.

    Raises:
        RunError: no tensors are recorded there.
    """
    from sfl.errors import RunError

    archive, report = recorded.archive, Report()
    _check_listed(recorded, report)
    rounds = [r for r in archive.rounds(client) if round in (None, r)]
    if not rounds:
        raise RunError(f"{archive.root} has no recorded tensors of that client and round")
    for round_index in rounds:
        _check_round(recorded, round_index, client, report)
    return report


def _check_listed(recorded: RecordedRun, report: Report) -> None:
    """Check the bytes of every model, log and manifest of the run."""
    from sfl.errors import IntegrityError

    for entry in recorded.archive.listed:
        try:
            recorded.archive.read(entry.path)
        except IntegrityError as error:
            report.find(error)


def _read_steps(
    recorded: RecordedRun, round_index: int, client: int | None, broken: set[int], report: Report
) -> "list[Step]":
    """Return the round's steps that the chosen client's back took, in order of processing.

    A back of which a manifest is damaged goes to ``broken``.
    """
    from sfl.errors import IntegrityError

    steps: list[Step] = []
    for k in sorted(recorded.weights):
        back = recorded.back_of(k)
        if client is not None and recorded.back_of(client) != back:
            continue
        try:
            steps += recorded.archive.steps(client=k, round=round_index)
        except IntegrityError as error:
            report.find(error)
            broken.add(back)
    return sorted(steps, key=lambda step: (step.order, step.client))


def _check_round(
    recorded: RecordedRun, round_index: int, client: int | None, report: Report
) -> None:
    """Recompute a round's steps, and what follows from them, from the round's starting weights."""
    from sfl.errors import IntegrityError

    broken: set[int] = set()  # the backs whose further steps cannot be computed
    steps = _read_steps(recorded, round_index, client, broken, report)
    try:
        backs = recorded.backs_at(round_index)
    except IntegrityError as error:
        report.find(error)
        backs, broken = {}, {recorded.back_of(k) for k in recorded.weights}
    losses = _recorded_losses(recorded, round_index)
    for step in steps:
        b, counts = recorded.back_of(step.client), client in (None, step.client)
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
    if client is None and not broken:
        _check_averages(recorded, round_index, backs, report)


def _recorded_losses(
    recorded: RecordedRun, round_index: int
) -> Mapping[tuple[int, str, str], float]:
    """Return the figures of a round's log; none for a round that did not end, or a damaged log."""
    from sfl.errors import IntegrityError
    from sfl.roundlog import read_round

    try:
        return read_round(recorded.archive.read(f"rounds/round_{round_index:03d}.csv"))
    except (IntegrityError, ValueError, KeyError):  # _check_listed names it
        return {}


def _check_step(
    recorded: RecordedRun,
    back: "Segment",
    step: "Step",
    losses: Mapping[tuple[int, str, str], float],
    report: Report,
) -> bool:
    """Recompute one step; say whether gradients and loss are the recorded ones.

    Raises:
        IntegrityError: its labels or activations are damaged; later steps cannot be computed.
    """
    from sfl.archive import GRADS, LABELS
    from sfl.errors import IntegrityError
    from sfl.protocol import Position
    from sfl.segment import train_step
    from sfl.tensors import identical

    at = Position(recorded.run.run, step.round, step.step, step.client)
    figures, grads = train_step(back, step.activations, step.labels, at)
    back.update()
    name = step.path(LABELS).name
    loss = losses.get((step.client, name, "loss"), figures.loss)
    same_loss = repr(loss) == repr(figures.loss)  # so that NaN is NaN
    if not same_loss:
        report.find(f"{step.path(LABELS)}: its loss differs: {figures.loss!r}, recorded {loss!r}")
    try:
        same_grads = identical(grads.cpu(), step.grads)
    except IntegrityError as error:
        report.find(error)
        return False
    if not same_grads:
        report.find(f"{step.path(GRADS)}: differs from the recomputed gradients")
    return same_grads and same_loss


def _check_averages(
    recorded: RecordedRun, round_index: int, backs: "Mapping[int, Segment]", report: Report
) -> None:
    """Compare the recorded averages of both halves with those computed again."""
    from sfl.aggregate import fed_avg
    from sfl.errors import IntegrityError
    from sfl.rounds import (
        CLIENT_MODEL,
        ONE_CLIENT_MODEL,
        SERVER_MODEL,
        average_backs,
        model_path,
    )

    archive, split = recorded.archive, recorded.split
    server_path = model_path(SERVER_MODEL, round_index)
    client_path = model_path(CLIENT_MODEL, round_index)
    if server_path not in {entry.path for entry in archive.listed}:
        return  # the run ended within this round
    states = {b: back.state() for b, back in sorted(backs.items())}
    try:
        back = average_backs(recorded.run, states, recorded.weights)
        if not _equal(back, archive.state(server_path, split.back_spec)):
            report.find(f"{archive.root / server_path}: differs from the recomputed average")
        fronts = {
            k: archive.state(model_path(ONE_CLIENT_MODEL, round_index, client=k), split.front_spec)
            for k in sorted(recorded.weights)
        }
        front = fed_avg(list(fronts.values()), [recorded.weights[k] for k in fronts])
        if not _equal(front, archive.state(client_path, split.front_spec)):
            report.find(f"{archive.root / client_path}: differs from the recomputed average")
    except IntegrityError as error:
        report.find(error)


def _equal(ours: "Mapping[str, Tensor]", theirs: "Mapping[str, Tensor]") -> bool:
    from sfl.tensors import identical

    return all(identical(ours[name], theirs[name]) for name in theirs)


def train_back(recorded: RecordedRun, options: Namespace) -> None:
    """Train a fresh back on the activations that one round recorded, and print its figures.

    A fifth of the recorded steps is held out. The activations of a round come from a front that
    was being trained; the last round's, which is the default, from the one that had settled most.

    Raises:
        RunError: no tensors are recorded there.
    """
    import torch

    from sfl import seeds
    from sfl.archive_writer import write_file
    from sfl.errors import RunError
    from sfl.protocol import Position
    from sfl.segment import add_up, evaluate_step, train_step
    from sfl.split_model import SplitModel
    from sfl.tensors import encode_state

    rounds = recorded.archive.rounds(options.client)
    chosen = max(rounds, default=0) if options.round is None else options.round
    steps = list(recorded.archive.steps(options.client, chosen))
    if len(steps) < 2:
        raise RunError(f"{recorded.archive.root} has no tensors of round {chosen}")
    changes = {name: getattr(options, name) for name in ("lr", "optimizer", "seed")}
    run = replace(recorded.run, **{n: v for n, v in changes.items() if v is not None})
    run.check()
    data = recorded.archive.environment()["data"]
    split = SplitModel(run, tuple(data["input_shape"]), len(data["classes"]))
    back = split.back(recorded.device)
    order = torch.randperm(len(steps), generator=seeds.generator(run.seed, seeds.OFFLINE, -1))
    num_held_out = max(len(steps) // 5, 1)
    held_out = [steps[i] for i in order[:num_held_out].tolist()]
    training = [steps[i] for i in order[num_held_out:].tolist()]
    print(f"round {chosen}: {len(training)} steps to train on, {len(held_out)} held out")
    for epoch in range(options.epochs):
        drawn = seeds.generator(run.seed, seeds.OFFLINE, epoch)
        loss_sum = samples = 0.0
        for i in torch.randperm(len(training), generator=drawn).tolist():
            at = Position(run.run, epoch, i, training[i].client)
            figures, _ = train_step(back, training[i].activations, training[i].labels, at)
            back.update()
            loss_sum += figures.loss * figures.samples
            samples += figures.samples
        tally = add_up(evaluate_step(back, step.activations, step.labels) for step in held_out)
        held = ", ".join(f"{name} {v:.4f}" for name, v in tally.figures("held_out").items())
        print(f"epoch {epoch + 1}/{options.epochs}: train_loss {loss_sum / samples:.4f}, {held}")
    if options.save:
        write_file(Path(options.save), encode_state(back.state()))
        print(f"the back lies in {options.save}")


def parse() -> Namespace:
    from sfl.options import Parser

    parser = Parser(prog="python -m experiments.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="shared_files/server/<run>")
    parser.add_argument("--client", type=int, metavar="K", help="this client's steps only")
    parser.add_argument("--round", type=int, metavar="R", help="this round only")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the run's, if not given")
    parser.add_argument("--threads", type=int, help="the run's, if not given")
    offline = parser.add_argument_group("train another back")
    offline.add_argument("--train-back", action="store_true", help="on the recorded activations")
    offline.add_argument("--epochs", type=int, default=5, help="passes over them (default: 5)")
    offline.add_argument("--lr", type=float, help="the run's, if not given")
    offline.add_argument("--optimizer", help="the run's, if not given")
    offline.add_argument("--seed", type=int, help="the run's, if not given")
    offline.add_argument("--save", metavar="FILE", help="write the trained back there")
    return parser.parse_args()


def load(run_dir: str | Path, device: str | None = None, threads: int | None = None) -> RecordedRun:
    """Open a run to compute with it, and warn if this process may compute other last bits."""
    from sfl import archive
    from sfl.config import NodeConfig
    from sfl.environment import differences, fingerprint, set_up_torch

    opened = archive.open(run_dir)
    theirs = opened.environment()["fingerprint"]
    of_run = theirs["device"].partition(":")[0]
    node = NodeConfig(device=device or of_run, threads=threads or int(theirs["threads"]))
    node.check()
    found = set_up_torch(node)
    for difference in differences(theirs, fingerprint(found)):
        print(f"warning: here {difference} of the run: the last bit may differ", file=sys.stderr)
    return RecordedRun(opened, found)


def main() -> int:
    options = parse()
    recorded = load(options.run_dir, options.device, options.threads)
    if options.train_back:
        train_back(recorded, options)
        return 0
    report = check(recorded, options.client, options.round)
    for finding in report.findings:
        print(finding)
    if report.unchecked:
        print(f"{report.unchecked} gradients rest on a damaged file and were not checked")
    print(report.summary)
    return 1 if report.findings or report.differ else 0


if __name__ == "__main__":
    sys.exit(run_program("replay", main))
