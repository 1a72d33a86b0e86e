"""Prepare a follower's part of a run: its segments, its records, and what it goes on from."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sfl.archive.manifest import ROUND_LOG
from sfl.archive.profile import Profile
from sfl.archive.round_log import RoundLog, write_table
from sfl.archive.run_folder import RUN_OVER, RunFolder, options_record, to_json
from sfl.archive.spool import Spool
from sfl.archive.writer import REWRITTEN
from sfl.conversation.cut import Cut
from sfl.conversation.followed import FollowedRounds
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.party import PREFIXES, TRAIN, ServerParty, ServerWatcher
from sfl.conversation.task_server import TaskRounds
from sfl.environment import Devices, command_line, describe
from sfl.errors import RunError
from sfl.model.metrics import StepFigures, Tally
from sfl.model.topology import Holder, States
from sfl.nodes import NodeConfig
from sfl.runtime.resume import Past, load_backs, open_past, read_shared
from sfl.runtime.round_figures import evaluated_figures
from sfl.runtime.round_files import optimizer_files
from sfl.runtime.start_weights import StartWeights
from sfl.strategy.merge import Shared, shared_files
from sfl.strategy.order import RoundPlan
from sfl.strategy.split_model import SplitModel
from sfl.tracking.tracking import Tracking
from sfl.values import Position
from sfl.weights.exchange import Elsewhere
from sfl.wire.link import Link


def follower_folder(node: NodeConfig, role: str) -> Path:
    """Return the folder of all runs of a follower: ``hop_1``, ``task_parity``."""
    return node.out_path / role.replace(":", "_")


@dataclass(kw_only=True)
class Follower:
    """The segments and folder of a hop or of a task's server, for all clients of a run.

    ``data``: the record of the clients' data. ``past``: the checkpoints that it resumes from.
    """

    role: str
    split: SplitModel  # by the recipe of this role
    data: Mapping[str, Any]
    folder: RunFolder
    node: NodeConfig
    devices: Devices
    start: StartWeights | None = None
    past: Past | None = None
    keeps_answers: bool = True  # so that clients may repeat their steps
    rounds: FollowedRounds = field(init=False)

    def __post_init__(self) -> None:
        row, split = self.split.recipe.scheme, self.split
        self.holder, recipe = split.recipe.in_role(self.role)
        copies = sorted(row.backs_of(map(int, self.data["num_samples"])))
        self._backs = {b: split.segments(self.holder, self.devices.of(b)) for b in copies}
        joint = split.joint
        self._joint_steps: JointSteps[Cut] | None = None
        if joint is not None and recipe.joins_at(self.holder):
            self._joint_steps = JointSteps(joint, recipe.run.label_client)
        first = self.past.first_round if self.past else 0
        self.folder.archive.discard_from(first, rewritten=REWRITTEN)
        self._environment = describe(self.devices[0], command_line()) | {"data": dict(self.data)}
        record = options_record(recipe.run, self.node) | {"role": self.role}
        for name, content in (("config", record), ("environment", self._environment)):
            self.folder.archive.write(name, f"{name}.json", to_json(content))
        self._figures = (
            TaskFigures(self, first) if self.holder is Holder.SERVER else NoFigures(self)
        )
        self.rounds = self._figures.rounds(
            split=split,
            num_samples={int(k): parts for k, parts in self.data["num_samples"].items()},
            backs=self._backs,
            joint_steps=self._joint_steps,
            shared=self._load(first) if self.past else self._initial(),
            spool=Spool(
                self.folder.path if self.keeps_answers else None, self.folder.archive.flush
            ),
            load=self._load,
            kept=self._kept,
            commit=self._commit,
            begun=self._figures.begin,
            next_round=first,
        )
        if not self.past:
            self._commit(0, self.rounds.shared, ())

    def party(self, client: int, link: Link, onward: Link | None = None) -> ServerParty:
        """Return the follower's side for one client."""
        return ServerParty(
            holder=self.holder,
            client=client,
            recipe=self.split.recipe,
            link=link,
            onward=onward,
            weights=Elsewhere(),
            split=self.split.of_party(client),
            archive=self.folder.archive,
            watcher=self._figures.watcher,
            profile=Profile(self.folder.path, wanted=False),
            backs=self._backs,
            joint_steps=self._joint_steps,
            num_samples=self.rounds.num_samples[client],
        )

    def note_end(self) -> None:
        """Write into the log that the run is over, as the server does."""
        self.folder.events.note(f"{RUN_OVER}{self.folder.path}")

    def _initial(self) -> dict[str, Shared]:
        initial: States = self.split.initial(self.holder)
        if self.start:
            initial = self.start.into(self.split, initial)
            for copy in self._backs.values():
                copy.load(initial)
        return {name: Shared(state) for name, state in initial.items()}

    def _kept(self) -> list[int]:
        """Return the rounds whose starting weights lie here."""
        self.folder.archive.flush()
        past = open_past(self.folder.path, self.split.recipe.run)
        return [checkpoint.round for checkpoint in past.checkpoints]

    def _load(self, round_index: int) -> dict[str, Shared]:
        """Load the weights that a round starts from into the copies, and return them.

        Raises:
            RunError: they do not lie here.
        """
        run, archive = self.split.recipe.run, self.folder.archive
        archive.flush()
        try:
            files = open_past(self.folder.path, run).at(round_index).files
        except RunError as error:
            raise RunError(
                f"{error}: start this {self.role} where it ran before, with the same --out"
            ) from error
        archive.discard_from(round_index)
        shared = read_shared(files, self.split, round_index)
        load_backs(files, run, self._backs, shared, round_index)
        return shared

    def _commit(
        self, round_index: int, shared: Mapping[str, Shared], took_part: Sequence[int]
    ) -> None:
        """Record what a round starts from, and wait until it is on disk.

        The server may then record that the round before is done.
        """
        archive, last = self.folder.archive, round_index - 1
        files = [f for item in shared.items() for f in shared_files(*item, last)]
        if self.split.recipe.training.keeps_optimizer and round_index:
            files += optimizer_files(self._backs, last)
        for kind, path, data in files:
            archive.write(kind, path, data, last)
        if round_index:
            self._figures.write_round(last, took_part)
            archive.end_round(last)
        about = {"data": dict(self.data), "fingerprint": self._environment["fingerprint"]}
        config = asdict(self.split.recipe.run)
        archive.commit(round_index, config, about, [path for _, path, _ in files])
        archive.wait_committed()


class NoFigures:
    """A hop is told no figures: its round's file says who took part. It says what goes wrong."""

    rounds = FollowedRounds

    def __init__(self, follower: Follower) -> None:
        self._folder = follower.folder
        self.watcher: ServerWatcher = self

    def begin(self, plan: RoundPlan) -> None: ...

    def say(self, line: str) -> None:
        self._folder.events.say(line)

    def start_round(self, round_index: int, num_steps: int) -> None: ...

    def step(self, at: Position, figures: StepFigures) -> None: ...

    def steps(self, client: int, table: Tensor) -> None: ...

    def predicted(self, client: int, labels: Tensor, outputs: Tensor) -> None: ...

    def write_round(self, round_index: int, took_part: Sequence[int]) -> None:
        path = f"rounds/round_{round_index:03d}.csv"
        table = write_table(())
        self._folder.archive.write(ROUND_LOG, path, table, round_index, tuple(took_part))


class TaskFigures:
    """The figures of a task's server, of its own labels."""

    def __init__(self, follower: Follower, first_round: int) -> None:
        self._folder, recipe = follower.folder, follower.split.recipe
        self._task, run, say = recipe.task, recipe.run, follower.folder.events.say
        tracking = Tracking({}, None, say)
        self._num_samples = follower.data["num_samples"]
        self.watcher = self._log = RoundLog(
            self._folder, run.rounds, recipe.task, first_round, tracking=tracking
        )
        self._clients: dict[int, dict[str, float]] = {}  # figures of each, in this round
        self._overall: dict[str, float] = {}
        self._took_part: Sequence[int] = ()
        self._began = 0.0

    def rounds(self, **fields: Any) -> TaskRounds:
        return TaskRounds(**fields, evaluated=self._evaluated)

    def begin(self, plan: RoundPlan) -> None:
        self._began, self._overall = time.perf_counter(), {}
        self._took_part = list(plan.order)
        samples = {int(k): parts[TRAIN] for k, parts in self._num_samples.items()}
        self._clients = {k: {"samples": n if k in plan.order else 0} for k, n in samples.items()}
        self._log.start_round(plan.round_index, plan.num_own_steps(plan.order))

    def write_round(self, round_index: int, took_part: Sequence[int]) -> None:
        self._log.write_round(round_index, self._clients, took_part)

    def _evaluated(
        self, round_index: int, part: str, tallies: Mapping[int, Tally]
    ) -> Mapping[str, float]:
        """Record the figures of a part that all clients have evaluated, and return them."""
        for client, tally in tallies.items():
            self._clients[client] |= self._task.figures(tally, PREFIXES[part])
        figures = evaluated_figures(self._task, {part: tallies})
        if not figures and self._overall:  # nobody has samples of this part
            return figures
        self._overall |= self._log.train_figures() | figures
        self._overall["seconds"] = time.perf_counter() - self._began
        self.write_round(round_index, self._took_part)
        self._folder.archive.flush()
        self._log.put_line(round_index, self._overall, self._took_part)
        return figures
