"""What a run is made of before its first round: model, records, checks, and each client's party."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from sfl.archive.profile import Profile
from sfl.archive.round_log import RoundLog
from sfl.archive.run_folder import RunFolder, options_record, to_json
from sfl.archive.spool import Spool
from sfl.archive.writer import REWRITTEN
from sfl.config import RunConfig
from sfl.conversation.join import Joined, describe_data
from sfl.conversation.party import TRAIN, ServerParty
from sfl.environment import command_line, describe, differences, fingerprint
from sfl.files.torch_file import max_state_bytes
from sfl.model.topology import Holder, Segments
from sfl.nodes import NodeConfig
from sfl.runtime.preflight import check_disk, check_space, disk_bytes, knows_classes
from sfl.runtime.resume import Past, load_backs, read_shared
from sfl.runtime.rounds import Rounds
from sfl.runtime.same_model import check_same_model
from sfl.strategy.merge import Shared
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import check_model
from sfl.weights.exchange import WeightStore
from sfl.wire.driver import Network
from sfl.wire.link import Absent, Link
from sfl.wire.payload import payload_store_in


@dataclass(frozen=True)
class Allowed:
    """What a run's rounds may do without."""

    fronts: bool = True  # they lie here; else another server has them
    skips: bool = False  # a round may close without a client
    at_once: int = 0  # so many train at the same time, see ``Rounds``
    answers: bool = True  # are kept, so that a client may redo its steps


@dataclass(kw_only=True)
class Preparation:
    """The steps from the clients that have joined to the rounds.

    ``store`` makes the store of weights for a client's link, with files of at most so many bytes.
    """

    recipe: Recipe
    joined: Mapping[int, Joined]
    network: Network
    folder: RunFolder
    node: NodeConfig
    device: torch.device
    store: Callable[[Link, int], WeightStore]
    past: Past | None = None
    allowed: Allowed = field(default_factory=Allowed)

    def __post_init__(self) -> None:
        past = self.past
        self._data = dict(past.data) if past else describe_data(self.joined, self.run)
        counts = self._data["num_samples"].items()
        self._num_samples = {k: parts for k, parts in sorted((int(k), p) for k, p in counts)}
        self._num_train = [parts[TRAIN] for parts in self._num_samples.values()]
        self._first_round = past.first_round if past else 0
        self._fingerprint = fingerprint(self.device)

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    def rounds(self) -> Rounds:
        """Build the model for the clients' data, record what is run, and check the disk.

        Raises:
            ConfigError: the model does not take such data, or cannot be trained in its segments.
            RunError: the clients' data do not go together, or the disk is too small.
            IntegrityError: a file that the run goes on from is damaged.
        """
        check_same_model(self._split, self.joined, self.folder.events.say)
        self._look_at(self._split)
        self._warn_of_differences()
        self._record()
        self._check_disk()
        shared = self._shared()
        return self._rounds(self._parties(), shared)

    @cached_property
    def _split(self) -> SplitModel:
        return SplitModel.of_data(self.recipe, self._data)

    @cached_property
    def _log(self) -> RoundLog:
        return RoundLog(self.folder, self.run.rounds, self.recipe.task, self._first_round)

    @cached_property
    def _backs(self) -> dict[int, Segments]:
        """All copies of the server's model; none where nothing is exchanged in a round."""
        row = self.recipe.scheme
        if row.exchange is Exchange.NOTHING:
            return {}
        indices = sorted({row.back_of(k) for k in self._num_samples})
        return {b: self._split.segments(Holder.SERVER, self.device) for b in indices}

    def _store_of(self, link: Link) -> WeightStore:
        return self.store(link, max_state_bytes(self._split.front_spec))

    def _look_at(self, split: SplitModel) -> None:
        """Try the model if that could not be done before, and say what is unusual about it."""
        say = self.folder.events.say
        if not knows_classes(self.run):
            check_model(split)
        if split.is_in_eval:
            say(
                "warning: the model came in eval() and stays in it while it is trained: it has no"
                " dropout, and BatchNorm keeps its statistics"
            )
        if not split.front_spec:
            say("warning: the front has no weights: what clients send are their raw data")

    def _warn_of_differences(self) -> None:
        """Say what may change the last bit: between machines, and to the run so far."""
        ours, say = self._fingerprint, self.folder.events.say
        for k, client in self.joined.items():
            for found in differences(ours, client.fingerprint):
                say(f"warning: client_{k} has {found} of the server: the last bit may differ")
        for found in differences(self.past.fingerprint, ours) if self.past else ():
            say(f"warning: {found} of the run so far: the last bit may differ")

    def _record(self) -> None:
        """Write down configuration and machines."""
        archive = self.folder.archive
        archive.discard_from(self._first_round, rewritten=REWRITTEN)
        clients = {f"client_{k}": dict(client.fingerprint) for k, client in self.joined.items()}
        environment = describe(self.device, command_line())
        environment |= {"clients": clients, "data": self._data}
        archive.write("config", "config.json", to_json(options_record(self.run, self.node)))
        archive.write("environment", "environment.json", to_json(environment))

    def _check_disk(self) -> None:
        left = self.recipe.changed(rounds=self.run.rounds - self._first_round)
        path, may_change = self.folder.path, not self.past
        self.folder.events.say(check_disk(path, left, self._needed, may_change=may_change))

    def _needed(self, recipe: Recipe) -> int:
        """Return how much of the disk a run takes."""
        return disk_bytes(recipe, self._split, self._num_train)

    def _shared(self) -> dict[str, Shared]:
        """Return what the first round starts from, and load the backs of a run that goes on."""
        past, split, first_round = self.past, self._split, self._first_round
        if past:
            shared = read_shared(past.files, split, first_round)
            load_backs(past.files, self.run, self._backs, shared, first_round)
            return shared
        holders = tuple(Holder) if self.allowed.fronts else (Holder.SERVER,)
        return {name: Shared(state) for name, state in split.initial(*holders).items()}

    def _parties(self) -> dict[int, ServerParty]:
        profile = Profile(self.folder.path, wanted=self.node.profile)
        own_rounds = self.past.own_rounds if self.past else {}
        links = {
            k: self.joined[k].link if k in self.joined else Absent(k) for k in self._num_samples
        }
        return {
            k: ServerParty(
                client=k,
                recipe=self.recipe,
                link=links[k],
                weights=self._store_of(links[k]),
                split=self._split,
                archive=self.folder.archive,
                watcher=self._log,
                profile=profile,
                backs=self._backs,
                num_samples=parts,
                own_round=own_rounds.get(k, 0),
            )
            for k, parts in self._num_samples.items()
        }

    def _rounds(self, parties: Mapping[int, ServerParty], shared: dict[str, Shared]) -> Rounds:
        folder, archive = self.folder, self.folder.archive
        a_round = self._needed(self.recipe.changed(rounds=1))
        rounds = Rounds(
            network=self.network,
            parties=parties,
            backs=self._backs,
            split=self._split,
            archive=archive,
            log=self._log,
            shared=shared,
            store=self._store_of,
            spool=Spool(folder.path if self.allowed.answers else None, archive.flush),
            payloads=payload_store_in(folder.path),
            about=self._about(),
            check_there=folder.check_exists,
            check_space=lambda: check_space(folder.path, a_round),
            first_round=self._first_round,
            may_skip=self.allowed.skips,
            at_once=self.allowed.at_once,
        )
        for k in parties:
            rounds.limit(k)
        return rounds

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint records beside the weights."""
        known = dict(self.past.client_fingerprints) if self.past else {}
        clients = known | {k: dict(client.fingerprint) for k, client in self.joined.items()}
        return {"data": self._data, "fingerprint": self._fingerprint, "clients": clients}
