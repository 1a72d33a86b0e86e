"""Prepare a run before its first round: model, records, checks, and each client's party."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from sfl.archive.layout import TRACKED
from sfl.archive.profile import Profile
from sfl.archive.round_log import DOWN, UP, RoundLog
from sfl.archive.run_folder import RunFolder, options_record, to_json
from sfl.archive.spool import Spool
from sfl.archive.writer import REWRITTEN
from sfl.config import RunConfig
from sfl.conversation.alignment import aligned_counts, num_of
from sfl.conversation.cut import Cut, kinds_by_link
from sfl.conversation.join import Joined, reports_of
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.party import PREFIXES, TRAIN, VALIDATION, ServerParty
from sfl.conversation.report import DataReport, describe_data
from sfl.data.client_data import num_batches
from sfl.data.vertical import Ids, align
from sfl.environment import (
    Devices,
    command_line,
    describe,
    differences,
    fingerprint,
    named_devices,
    other_runtime,
)
from sfl.errors import DataError, RunError
from sfl.files.torch_file import max_state_bytes
from sfl.model.topology import Holder, Segments, States
from sfl.nodes import NodeConfig, PeerNode, SimulationNode
from sfl.runtime.memory import memory_limit_bytes
from sfl.runtime.preflight import check_disk, check_space, disk_bytes, knows_classes
from sfl.runtime.resume import Past, load_backs, read_shared
from sfl.runtime.rounds import Rounds
from sfl.runtime.same_model import check_same_model, check_same_start
from sfl.runtime.start_weights import StartWeights
from sfl.strategy.early_stopping import RoundsSeen
from sfl.strategy.merge import Shared, fewest_clients
from sfl.strategy.ranks import OneRank, Ranks
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import check_model, unordered
from sfl.tracking.tracked import TrackedRun, Tracker
from sfl.tracking.tracking import Tracking
from sfl.weights.exchange import WeightStore
from sfl.wire.driver import Network
from sfl.wire.link import Absent, Link, one_line
from sfl.wire.payload import payload_store_in


@dataclass(frozen=True)
class RoundOptions:
    """How a server's rounds are run."""

    has_fronts: bool = True  # this server has the fronts; else a separate fed server
    may_skip: bool = False  # a round may close without a client
    at_once: int = 0  # most clients that train at the same time, see ``Rounds``
    keeps_answers: bool = True  # so that a client may repeat its steps


@dataclass(kw_only=True)
class Preparation:
    """Builds ``Rounds`` for the clients that have joined.

    ``store`` makes the store of weights for a client's link and a largest file's bytes.
    """

    recipe: Recipe
    joined: Mapping[int, Joined]
    network: Network
    folder: RunFolder
    node: NodeConfig
    devices: Devices
    store: Callable[[Link, int], WeightStore]
    past: Past | None = None
    start: StartWeights | None = None  # that a new run starts from; None: the seed's
    trackers: Mapping[str, Tracker] = field(default_factory=dict)
    options: RoundOptions = field(default_factory=RoundOptions)
    ranks: Ranks = field(default_factory=OneRank)

    def __post_init__(self) -> None:
        past, self._order, own = self.past, self._aligned(), reports_of(self.joined)
        if self._order is not None:
            counts = aligned_counts(num_of(self._order))
            own = {k: replace(report, num_samples=counts) for k, report in own.items()}
        self._reports = self.ranks.gather(own, asdict, DataReport.unpacked)
        self._data = dict(past.data) if past else describe_data(self._reports, self.recipe)
        num_samples = {int(k): parts for k, parts in self._data["num_samples"].items()}
        self._num_samples = dict(sorted(num_samples.items()))
        self._ours = self.ranks.ours(list(self._num_samples))
        self._num_train = [self._num_samples[k][TRAIN] for k in self._ours]
        self._first_round = past.first_round if past else 0
        self._fingerprint = fingerprint(self.devices[0])

    def _aligned(self) -> Ids | None:
        """Return the ids that all clients have, if their samples are aligned by them.

        Raises:
            RunError: there are none, or a client is not there.
        """
        if not self.recipe.aligns:
            return None
        ids = {k: joined.ids for k, joined in self.joined.items() if joined.ids is not None}
        if len(ids) < self.recipe.run.clients:
            raise RunError("a client is missing, whose samples the others' are aligned with")
        try:
            order = align(ids, self.recipe.run.seed)
        except DataError as error:
            raise RunError(str(error)) from error
        theirs = ", ".join(f"{len(own[TRAIN])} of client_{k}" for k, own in ids.items())
        found = ", ".join(f"{len(shared)} {part}" for part, shared in order.items())
        self.folder.events.say(
            f"samples that all clients have: {found}; training samples: {theirs}"
        )
        if len(order[TRAIN]) < 2:
            raise RunError("a single training sample is at all clients; a batch needs two")
        return order

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    def rounds(self) -> Rounds:
        """Build the model for the clients' data, record the configuration, and check the disk.

        Raises:
            ConfigError: the model does not fit the data, or cannot be trained in its segments.
            RunError: a client built another model, or the disk is too small.
            IntegrityError: a file that the run resumes from is damaged.
        """
        check_same_model(self._split, self.joined, self.folder.events.say)
        self._check_model(self._split)
        self._check_watched()
        self._warn_of_differences()
        self._record()
        self._check_disk()
        shared, say = self._shared(), self.folder.events.say_of_run
        check_same_start(shared, self._fingerprint, self.ranks, ours=self._ours, say=say)
        return self._rounds(self._parties(), shared)

    @cached_property
    def _split(self) -> SplitModel:
        # Clients choose the shapes; training takes three more values a weight.
        most = memory_limit_bytes(self.node) / 4 if isinstance(self.node, PeerNode) else math.inf
        return SplitModel.of_data(self.recipe, self._data, most)

    @cached_property
    def _log(self) -> RoundLog:
        up, down = kinds_by_link(self.recipe.segments)
        by_link = [*map(UP.format, up), *map(DOWN.format, down)]
        recipe = self.recipe
        return RoundLog(
            self.folder, self.run.rounds, recipe.task, self._first_round, by_link,
            tracking=Tracking(self.trackers, self._tracked_run(), self.folder.events.say),
        )  # fmt: skip

    def _tracked_run(self) -> TrackedRun:
        run = self.run
        most = max(num_batches(n, run.batch_size) for n in self._num_train) * run.local_epochs
        return TrackedRun(
            name=run.run,
            folder=self.folder.path / TRACKED,
            config=asdict(run),
            steps_in_round=most,
            first_round=self._first_round,
            is_resumed=self.past is not None,
            classes=self._data["classes"],
        )

    @cached_property
    def _backs(self) -> dict[int, Segments]:
        """All copies of the server's segments; none if clients train alone."""
        row = self.recipe.scheme
        if row.exchange is Exchange.NOTHING:
            return {}
        indices = sorted(row.backs_of(self._ours))
        return {b: self._split.segments(Holder.SERVER, self.devices.of(b)) for b in indices}

    @cached_property
    def _joint_steps(self) -> JointSteps[Cut] | None:
        joint = self._split.joint
        return JointSteps[Cut](joint, self.run.label_client) if joint else None

    def _store_of(self, link: Link) -> WeightStore:
        return self.store(link, max_state_bytes(self._split.front_spec))

    def _check_model(self, split: SplitModel) -> None:
        """Try the model if the classes were unknown before; warn of unusual properties."""
        say = self.folder.events.say
        if not knows_classes(self.run):
            check_model(split)
        if split.is_in_eval:
            say(
                "warning: the model came in eval() and stays in it while it is trained: it has no"
                " dropout, and BatchNorm keeps its statistics"
            )
        devices = {Holder.SERVER: self.devices[0]}
        if isinstance(self.node, SimulationNode):  # which computes for the clients as well
            devices[Holder.CLIENT] = named_devices(self.node.of_clients)[0]
        if found := unordered(split, devices):
            say(f"warning: {found}")
        if not split.front_spec:
            say("warning: the front has no weights: what clients send are their raw data")

    def _warn_of_differences(self) -> None:
        """Warn of differences in environment that may change the last bit of results."""
        ours, say = self._fingerprint, self.folder.events.say
        for k, client in self.joined.items():
            if runtime := other_runtime(client.fingerprint):
                say(
                    f"warning: client_{k} computes with {one_line(runtime, 80)}: its steps equal"
                    " torch's to about 1e-4, not bit for bit; the server's part replays exactly"
                )
                continue
            for found in differences(ours, client.fingerprint):
                say(f"warning: client_{k} has {found} of the server: the last bit may differ")
        for found in differences(self.past.fingerprint, ours) if self.past else ():
            say(f"warning: {found} of the run so far: the last bit may differ")

    def _record(self) -> None:
        """Write the configuration and the environment."""
        archive = self.folder.archive
        archive.discard_from(self._first_round, rewritten=REWRITTEN)
        clients = {f"client_{k}": dict(client.fingerprint) for k, client in self.joined.items()}
        environment = describe(self.devices[0], command_line())
        environment |= {"clients": clients, "data": self._data, **self.ranks.record()}
        archive.write("config", "config.json", to_json(options_record(self.run, self.node)))
        archive.write("environment", "environment.json", to_json(environment))

    def _check_disk(self) -> None:
        left = self.recipe.changed(rounds=self.run.rounds - self._first_round)
        path, may_change = self.folder.path, not self.past
        self.folder.events.say(check_disk(path, left, self._bytes_needed, may_change=may_change))

    def _bytes_needed(self, recipe: Recipe) -> int:
        """Return about how many bytes a run writes."""
        return disk_bytes(recipe, self._split, self._num_train)

    def _shared(self) -> dict[str, Shared]:
        """Return the weights that the first round starts from, and load the backs."""
        past, split, first_round = self.past, self._split, self._first_round
        if past:
            shared = read_shared(past.files, split, first_round)
            load_backs(past.files, self.run, self._backs, shared, first_round)
            return shared
        has_fronts = self.options.has_fronts and not self.recipe.joins
        holders = (Holder.CLIENT, Holder.SERVER) if has_fronts else (Holder.SERVER,)
        initial: States = split.initial(*holders)
        if self.start:
            self.folder.events.say(self.start.line(split))
            initial = self.start.into(split, initial)
            for copy in self._backs.values():
                copy.load(initial)
        return {name: Shared(state) for name, state in initial.items()}

    def _parties(self) -> dict[int, ServerParty]:
        profile = Profile(self.folder.path, wanted=self.node.profile)
        own_rounds = self.past.own_rounds if self.past else {}
        links = {k: self.joined[k].link if k in self.joined else Absent(k) for k in self._ours}
        return {
            k: ServerParty(
                client=k,
                recipe=self.recipe,
                link=links[k],
                weights=self._store_of(links[k]),
                split=self._split.of_party(k),
                archive=self.folder.archive,
                watcher=self._log,
                profile=profile,
                backs=self._backs,
                joint_steps=self._joint_steps,
                order=self._order,
                num_samples=self._num_samples[k],
                own_round=own_rounds.get(k, 0),
            )
            for k in self._ours
        }

    def _rounds(self, parties: Mapping[int, ServerParty], shared: dict[str, Shared]) -> Rounds:
        folder, archive = self.folder, self.folder.archive
        round_bytes = self._bytes_needed(self.recipe.changed(rounds=1))
        rounds = Rounds(
            network=self.network,
            parties=parties,
            num_samples=self._num_samples,
            backs=self._backs,
            split=self._split,
            archive=archive,
            log=self._log,
            seen=self._seen(),
            shared=shared,
            store=self._store_of,
            joint_steps=self._joint_steps,
            spool=Spool(folder.path if self.options.keeps_answers else None, archive.flush),
            payloads=payload_store_in(folder.path),
            about=self._about(),
            check_there=folder.check_exists,
            check_space=lambda: check_space(folder.path, round_bytes),
            first_round=self._first_round,
            may_skip=self.options.may_skip,
            fewest=fewest_clients(self.recipe),
            at_once=self.options.at_once,
            ranks=self.ranks,
        )
        for k in parties:
            rounds.set_limits(k)
        return rounds

    def _seen(self) -> RoundsSeen:
        return self.past.seen(self.recipe) if self.past else RoundsSeen(self.recipe)

    def _check_watched(self) -> None:
        """Check that the metrics by which rounds are compared will be known.

        Raises:
            RunError: no client has samples for one, or some keep what it is made of.
        """
        recipe, counts = self.recipe, self._num_samples
        watched = {"--stop-when": recipe.stop.metric, "--keep-models best": recipe.keep.best_by}
        silent = [
            k for k, one in self._reports.items()
            if counts[k][VALIDATION] and not one.tells_classes
        ]  # fmt: skip
        of_classes = recipe.task.table.columns if recipe.task.table else ()
        for option, metric in watched.items():
            part, _, name = metric.partition("_")
            if part == PREFIXES[VALIDATION] and not any(n[VALIDATION] for n in counts.values()):
                raise RunError(
                    f"{option}: no client has validation samples, so that there is no {metric};"
                    " name a metric of training"
                )
            if part == PREFIXES[VALIDATION] and name in of_classes and silent:
                raise RunError(
                    f"{option}: client_{silent[0]} keeps its labels, and with them the figures of"
                    f" each class that {metric} needs; name another metric, or start such clients"
                    " with --share-figures"
                )

    def _about(self) -> dict[str, Any]:
        """Return the further content of a checkpoint."""
        known = dict(self.past.client_fingerprints) if self.past else {}
        clients = known | {k: dict(client.fingerprint) for k, client in self.joined.items()}
        return {"data": self._data, "fingerprint": self._fingerprint, "clients": clients}
