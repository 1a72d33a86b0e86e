"""Prepare a hop's part of a run: its segments, its records, and the checkpoints it goes on from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sfl.archive.manifest import ROUND_LOG
from sfl.archive.profile import Profile
from sfl.archive.round_log import write_table
from sfl.archive.run_folder import RunFolder, options_record, to_json
from sfl.archive.spool import Spool
from sfl.archive.writer import REWRITTEN
from sfl.conversation.cut import Cut
from sfl.conversation.followed import FollowedRounds
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.party import ServerParty
from sfl.environment import Devices, command_line, describe
from sfl.errors import RunError
from sfl.model.metrics import StepFigures
from sfl.model.topology import Holder, States
from sfl.nodes import NodeConfig
from sfl.runtime.resume import Past, load_backs, open_past, read_shared
from sfl.runtime.round_files import optimizer_files
from sfl.runtime.start_weights import StartWeights
from sfl.strategy.merge import Shared, shared_files
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.weights.exchange import Elsewhere
from sfl.wire.link import Link


def hop_folder(node: NodeConfig, holder: Holder) -> Path:
    """Return the folder of all runs of a hop."""
    return node.out_path / f"hop_{holder.place}"


@dataclass(kw_only=True)
class Follower:
    """A hop's segments and folder, for all clients of a run.

    ``data``: the record of the clients' data. ``past``: the checkpoints that it resumes from.
    """

    holder: Holder
    split: SplitModel
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
        copies = sorted(row.backs_of(map(int, self.data["num_samples"])))
        self._backs = {b: split.segments(self.holder, self.devices.of(b)) for b in copies}
        joint, recipe = split.joint, split.recipe
        self._joint_steps: JointSteps[Cut] | None = None
        if joint is not None and recipe.joins_at(self.holder):
            self._joint_steps = JointSteps(joint, recipe.run.label_client)
        first = self.past.first_round if self.past else 0
        self.folder.archive.discard_from(first, rewritten=REWRITTEN)
        self._environment = describe(self.devices[0], command_line()) | {"data": dict(self.data)}
        role = {"role": f"hop:{self.holder.place}"}
        record = options_record(self.split.recipe.run, self.node) | role
        for name, content in (("config", record), ("environment", self._environment)):
            self.folder.archive.write(name, f"{name}.json", to_json(content))
        self.rounds = FollowedRounds(
            split=split,
            num_samples={int(k): parts for k, parts in self.data["num_samples"].items()},
            backs=self._backs,
            joint_steps=self._joint_steps,
            shared=self._load(first) if self.past else self._initial(),
            spool=Spool(
                self.folder.path if self.keeps_answers else None, self.folder.archive.flush
            ),
            load=self._load,
            commit=self._commit,
            next_round=first,
        )
        if not self.past:
            self._commit(0, self.rounds.shared, ())

    def party(self, client: int, link: Link, onward: Link) -> ServerParty:
        """Return the hop's side for one client."""
        return ServerParty(
            holder=self.holder,
            client=client,
            recipe=self.split.recipe,
            link=link,
            onward=onward,
            weights=Elsewhere(),
            split=self.split.of_party(client),
            archive=self.folder.archive,
            watcher=_Watcher(self.folder),
            profile=Profile(self.folder.path, wanted=False),
            backs=self._backs,
            joint_steps=self._joint_steps,
            num_samples=self.rounds.num_samples[client],
        )

    def _initial(self) -> dict[str, Shared]:
        initial: States = self.split.initial(self.holder)
        if self.start:
            initial = self.start.into(self.split, initial)
            for copy in self._backs.values():
                copy.load(initial)
        return {name: Shared(state) for name, state in initial.items()}

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
                f"{error}: start this hop where it ran before, with the same --out"
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
            path = f"rounds/round_{last:03d}.csv"  # without figures: says who took part
            archive.write(ROUND_LOG, path, write_table(()), last, tuple(took_part))
            archive.end_round(last)
        about = {"data": dict(self.data), "fingerprint": self._environment["fingerprint"]}
        config = asdict(self.split.recipe.run)
        archive.commit(round_index, config, about, [path for _, path, _ in files])
        archive.wait_committed()


class _Watcher:
    """A hop is told no figures; it says what goes wrong."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def say(self, line: str) -> None:
        self._folder.events.say(line)

    def start_round(self, round_index: int, num_steps: int) -> None: ...

    def step(self, at: Position, figures: StepFigures) -> None: ...

    def steps(self, client: int, table: Tensor) -> None: ...

    def predicted(self, client: int, labels: Tensor, outputs: Tensor) -> None: ...
