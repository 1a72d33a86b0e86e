"""Run server and clients in one process without sockets: the reference for socket runs.

Both ends of the conversations are the same code; only the links are queues in memory.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from sfl.archive.live_status import LiveStatus
from sfl.archive.profile import Profile
from sfl.archive.run_folder import (
    SERVER_LOG,
    create_run_folder,
    open_folder,
    reporting_failure,
    say,
)
from sfl.archive.writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.conversation.alignment import client_align, hop_pass_order
from sfl.conversation.hop import hop_run
from sfl.conversation.join import Joined
from sfl.conversation.party import ClientParty, ServerParty
from sfl.conversation.report import DataReport, check_agreement, describe_data
from sfl.conversation.round import client_run
from sfl.conversation.task_server import TaskRounds, task_run
from sfl.data.client_data import ClientData, Source, client_data, load
from sfl.data.datasets import dataset_of
from sfl.data.partition import OWN, deal
from sfl.data.private_data import load_own
from sfl.data.samples import join
from sfl.environment import Devices, fingerprint, set_up_devices
from sfl.errors import ConfigError, DataError, counted
from sfl.model.metrics import StepFigures
from sfl.model.topology import Holder, hops_of
from sfl.nodes import NodeConfig, SimulationNode, TrackingNode
from sfl.runtime.follower import Follower, follower_folder
from sfl.runtime.local_network import Away, LocalLink, LocalNetwork, local_pair
from sfl.runtime.preflight import check_run, check_start
from sfl.runtime.preparation import Preparation, RoundOptions
from sfl.runtime.resume import load_own_state
from sfl.runtime.rounds import Rounds
from sfl.runtime.server import finish
from sfl.runtime.start_weights import StartWeights, read_start, started
from sfl.runtime.task_servers import at_each_server
from sfl.runtime.whereabouts import in_followed, in_rounds
from sfl.strategy.merge import fewest_clients
from sfl.strategy.order import draw
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.tracking.tracked import Tracker
from sfl.trusted_imports import remember
from sfl.values import KEEP_NOTHING, Position
from sfl.weights.stores import StoreOptions, store_maker
from sfl.wire.driver import Conversation


def check_away(recipe: Recipe, absences: Sequence[Away]) -> None:
    """Check that absences leave each round the clients that its aggregation rule needs.

    Raises:
        ConfigError: they leave a round too few, which would wait for others in a run over sockets.
    """
    run, needed = recipe.run, fewest_clients(recipe)
    every = range(1 if recipe.scheme.pooled else run.clients)
    if absences and recipe.has_followers:
        raise ConfigError(f"--away: leave it out with --topology {run.topology}: all are needed")
    for away in absences:
        if not recipe.may_leave(away.client):
            k = away.client
            raise ConfigError(f"--away {k}: all steps need the labels of client_{k}")
    if not absences:
        return
    last = max(away.back or away.round + 1 for away in absences)
    out: set[int] = set()
    waiting = list(absences)
    for index in range(min(run.rounds, last + 1)):
        for away in [a for a in waiting if a.back == index and a.client in out]:
            waiting.remove(away)
            out.discard(away.client)
        here = [k for k in every if k not in out]
        # A round that all have left begins again with others, if these are enough.
        drawn = draw(run, here, index) if needed > 1 else here
        out |= {a.client for a in waiting if a.round == index}
        if (left := len(set(drawn) - out)) < needed:
            raise ConfigError(
                f"--away leaves round {index + 1}/{run.rounds} with {counted(left, 'client')};"
                " --aggregation"
                f" {run.aggregation} needs {needed} in --scheme {run.scheme}"
            )


def simulate(
    run: RunConfig,
    node: NodeConfig,
    away: Sequence[Away] = (),
    *,
    trackers: Mapping[str, Tracker] | None = None,
) -> Path:
    """Simulate a run in this process; return its folder, which has the same files.

    With ``--partition own``, client k's data are read from ``<data-dir>/client_k``. ``trackers``:
    as ``trackers_of`` returns them.

    Raises:
        ConfigError, DataError, RunError: as for server and clients.
    """
    recipe = check_run(run, imports_data=True)
    check_away(recipe, away)
    start = read_start(node.init if isinstance(node, TrackingNode) else "", recipe)
    check_start(start, recipe)
    recipe = started(recipe, start)
    num_clients = 1 if recipe.scheme.pooled else run.clients
    where = f"a simulation of {counted(num_clients, 'client')}"
    of_clients = node.of_clients if isinstance(node, SimulationNode) else node
    clients_devices = set_up_devices(of_clients, num_clients, where)
    devices = set_up_devices(node, num_clients, where)
    data = _load_all(recipe, node)
    if recipe.scheme.pooled:
        data = {0: pooled(data, recipe.run)}
    path = create_run_folder(node.out_path / "server", recipe.run.run)
    remember([recipe.run.model])
    recipe = recipe.changed(run=path.name)
    with (
        open_folder(path, SERVER_LOG, recipe.keep) as folder,
        contextlib.ExitStack() as archives,
        reporting_failure(folder),
    ):
        folder.events.say(f"run {path.name}: {counted(len(data), 'client')} in this process")
        clients = _Clients(recipe, node, clients_devices, data, start)
        network = LocalNetwork(away)
        options = StoreOptions(
            recipe.run.weights, path / "downloads", node.weights_timeout, node.weights_timeout, say
        )
        rounds = Preparation(
            recipe=recipe,
            joined={k: clients.joined(k) for k in data},
            network=network,
            folder=folder,
            node=node,
            devices=devices,
            store=store_maker(options.open_place(), options),
            start=start,
            trackers=trackers or {},
            options=RoundOptions(may_skip=bool(away), keeps_answers=False),
        ).rounds()
        clients.start(rounds, network, archives)
        archives.enter_context(LiveStatus(path, lambda: in_rounds(rounds)))
        finish(rounds, folder)
    return path


class _Clients:
    """The clients of a simulation, each a conversation over a link within the process."""

    def __init__(
        self,
        recipe: Recipe,
        node: NodeConfig,
        devices: Devices,
        data: Mapping[int, ClientData],
        start: StartWeights | None,
    ) -> None:
        self._recipe, self._node, self._devices, self._start = recipe, node, devices, start
        self._at_servers = {k: at_each_server(own, recipe) for k, own in data.items()}
        self._data = {k: own for k, (own, *_) in self._at_servers.items()}
        self._fingerprint = fingerprint(devices[0])
        self._reports = {
            k: DataReport.of(
                part, recipe.run, keeps_labels=recipe.keeps_labels, passes_hops=recipe.has_hops
            )
            for k, part in self._data.items()
        }
        self._hops = [hop.role for hop in hops_of(recipe.segments)]
        self._ends = {k: self._chain(k) for k in data}

    def _chain(self, client: int) -> list[tuple[LocalLink, LocalLink]]:
        """Return the links between a client and the server: both ends of each, the server's first.

        The client's come last.
        """
        return [local_pair(client) for _ in range(len(self._hops) + 1)]

    def joined(self, client: int) -> Joined:
        """Return a client's registration, as the server would receive it."""
        known = self._data[client].identified
        return Joined(
            client, self._ends[client][0][0], self._fingerprint, self._reports[client],
            known.ids if known else None,
        )  # fmt: skip

    def start(self, rounds: Rounds, network: LocalNetwork, archives: contextlib.ExitStack) -> None:
        """Start all clients' conversations, and set how absent ones return."""
        recipe, node = self._recipe, self._node
        of_clients = {
            k: archives.enter_context(_client_archive(recipe, node, k)) for k in self._data
        }

        made = {
            role: archives.enter_context(self._follower(role, rounds)) for role in recipe.followers
        }
        hops = [made.pop(role) for role in self._hops]
        tasks = [*made.values()]

        def take_part(party: ClientParty, links: Sequence[LocalLink]) -> Conversation[None]:
            own, leader = self._at_servers[party.client], recipe.leader(party.client)
            party.data, *further = yield from client_align(party.link, own, leader)
            for server, link, data in zip(tasks, links, further, strict=True):
                side = party.at_server(server.split.recipe, link, data)
                party.others = (*party.others, side)
            yield from client_run(party)

        def pass_on_all(hop: Follower, party: ServerParty) -> Conversation[None]:
            assert party.onward is not None
            if recipe.aligns:
                yield from hop_pass_order(party.link, party.onward)
            yield from hop_run(party, hop.rounds)

        def connect(client: int) -> None:
            party, chain = self._party(client, rounds, of_clients[client]), self._ends[client]
            to_tasks = [local_pair(client) for _ in tasks]
            further = [
                task_run(server.party(client, theirs), cast(TaskRounds, server.rounds))
                for server, (theirs, _) in zip(tasks, to_tasks, strict=True)
            ]
            own = zip(reversed(hops), itertools.pairwise(chain), strict=True)
            through = [
                pass_on_all(hop, hop.party(client, nearer[0], onward[1]))
                for hop, (onward, nearer) in own
            ]
            taken = take_part(party, [ours for _, ours in to_tasks])
            network.add(chain[0][0], taken, *reversed(through), *further)

        def bring_back(client: int) -> None:
            self._ends[client] = self._chain(client)
            connect(client)
            rounds.reconnect(self.joined(client))

        for k in self._data:
            connect(k)
        network.bring_back = bring_back

    @contextlib.contextmanager
    def _follower(self, role: str, rounds: Rounds) -> Iterator[Follower]:
        node, (_, recipe) = self._node, self._recipe.in_role(role)
        path = create_run_folder(follower_folder(node, role), recipe.run.run)
        split, data = rounds.split, rounds.about["data"]
        if recipe.server:
            reports = {
                k: dataclasses.replace(
                    DataReport.of(own[recipe.server], recipe.run),
                    num_samples=rounds.num_samples[k],
                )
                for k, own in self._at_servers.items()
            }
            data = describe_data(reports, recipe)
            split = SplitModel.of_data(recipe, data)
        with open_folder(path, SERVER_LOG, recipe.keep) as folder:
            folder.events.prefix = f"{role.replace(':', ' ')}: "
            follower = Follower(
                role=role,
                split=split,
                data=data,
                folder=folder,
                node=node,
                devices=self._devices,
                start=self._start,
                keeps_answers=False,
            )
            here = {k: ends[0][0] for k, ends in self._ends.items()}
            with LiveStatus(path, lambda: in_followed(follower.rounds, here)):
                yield follower
            follower.note_end()

    def _party(self, client: int, rounds: Rounds, archive: ArchiveWriter) -> ClientParty:
        recipe, split, link = self._recipe, rounds.split, self._ends[client][-1][1]
        segments = split.of_party(client).segments(Holder.CLIENT, self._devices.of(client))
        folder = _client_folder(recipe.run, self._node, client)
        return ClientParty(
            client=client,
            recipe=recipe,
            link=link,
            weights=rounds.store(link),
            split=split.of_party(client),
            archive=archive,
            watcher=_NoWatcher(),
            profile=Profile(folder, wanted=False),
            segments=segments,
            data=self._data[client],
            on_round=lambda round_index, figures: None,
            on_start=lambda _, own: load_own_state(folder, segments, recipe, client, own),
        )


def _client_archive(recipe: Recipe, node: NodeConfig, client: int) -> ArchiveWriter:
    """Return the writer of a client's folder, which records only its own state."""
    keep = dataclasses.replace(recipe.keep, tensors=KEEP_NOTHING)
    return ArchiveWriter(_client_folder(recipe.run, node, client), KEEP_NOTHING, keep)


def _client_folder(run: RunConfig, node: NodeConfig, client: int) -> Path:
    return node.out_path / "client" / run.run / f"client_{client}"


def pooled(data: Mapping[int, ClientData], run: RunConfig) -> ClientData:
    """Return the union of the clients' data, as one client's.

    Raises:
        RunError: their shapes or classes differ.
    """
    check_agreement({k: DataReport.of(part, run) for k, part in data.items()})
    parts = list(data.values())
    return dataclasses.replace(
        parts[0],
        train=join(part.train for part in parts),
        validation=join(part.validation for part in parts),
        test=join(part.test for part in parts),
    )


def _load_all(recipe: Recipe, node: NodeConfig) -> dict[int, ClientData]:
    run = recipe.run
    spec, clients = dataset_of(run), range(run.clients)
    if run.partition == OWN:
        folders = {k: node.data_path / f"client_{k}" for k in clients}
        for k, folder in folders.items():
            if not folder.is_dir():
                raise DataError(
                    f"there is no folder {folder}: a simulation reads client_{k}'s own data there,"
                    " in --data-dir"
                )
        return {
            k: load_own(
                spec, run, k, folder, say=say, has_ids=recipe.aligns, columns=recipe.tasks.columns
            )
            for k, folder in folders.items()
        }
    loaded = load(spec, Source(node.data_path, node.cache_path, spec.input_shape, say))
    return {k: client_data(spec, run, k, *part) for k, part in enumerate(deal(*loaded, run))}


class _NoWatcher:
    def start_round(self, round_index: int, num_steps: int) -> None:
        pass

    def step(self, at: Position, figures: StepFigures) -> None:
        pass

    def untold_step(self, at: Position) -> None:
        pass

    def say(self, line: str) -> None:
        pass
