"""Run the server: listen, register the clients, run the rounds, end the run."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sfl.archive.live_status import LiveStatus, Now
from sfl.archive.run_folder import (
    RUN_OVER,
    SERVER_LOG,
    EventLog,
    RunFolder,
    create_run_folder,
    new_run_name,
    open_folder,
    options_record,
    reporting_failure,
    to_json,
)
from sfl.config import RunConfig
from sfl.conversation.fed import put_start
from sfl.conversation.join import APART, HERE, Joined, reports_of
from sfl.conversation.report import describe_data
from sfl.crash import crash_point
from sfl.environment import Devices, command_line, set_up_devices
from sfl.errors import ConfigError, RunError, command, counted
from sfl.files.atomic import write_file
from sfl.nodes import ServerNode
from sfl.runtime.admission import Admission
from sfl.runtime.client_places import Patience
from sfl.runtime.fed_server import fed_server
from sfl.runtime.group import ALONE, Group, common_past, hint_of, in_turn, share_of
from sfl.runtime.lobby import Lobby
from sfl.runtime.on_end import running_at_end
from sfl.runtime.preflight import check_clients_options, check_role, check_run, check_start
from sfl.runtime.preparation import Preparation, RoundOptions
from sfl.runtime.report_limits import claim_error
from sfl.runtime.resume import (
    Past,
    has_begun,
    open_past,
)
from sfl.runtime.rounds import Rounds
from sfl.runtime.same_model import ServersModel
from sfl.runtime.share import Share
from sfl.runtime.start_weights import StartWeights, read_start, started
from sfl.runtime.whereabouts import in_lobby, in_rounds
from sfl.strategy.merge import fewest_connected
from sfl.strategy.ranks import Ranks, block
from sfl.strategy.recipe import Recipe
from sfl.strategy.tasks import addresses_of
from sfl.tracking.tracked import Tracker
from sfl.tracking.trackers import trackers_of
from sfl.transport.guard import Terms, guard_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import SERVER, seal_secret
from sfl.transport.transports import ServerNetwork, transport_of
from sfl.trusted_imports import remember
from sfl.weights.exchange import Elsewhere
from sfl.weights.object_store import ObjectStore
from sfl.weights.stores import StoreOptions, store_maker


def serve(run: RunConfig, node: ServerNode, group: Group = ALONE) -> Path:
    """Run a server for one run; return the run's folder.

    ``group``: the processes of which this one serves a share of the clients.

    Raises:
        ConfigError: the options cannot be used together, or on this machine.
        RunError: the port, the folder or the disk cannot be used; or a client has left.
        ProtocolError, IntegrityError, ConnectionLost, PeerFailed: from the clients.
    """
    # A resumed folder may come from another machine: do not import what it names.
    recipe = check_run(run, imports_data=not node.resume)
    run = recipe.run
    if recipe.scheme.pooled:
        raise ConfigError(
            f"--scheme {run.scheme} pools all data in one process: {command('simulate')}"
        )
    transport = transport_of(node)
    check_role(recipe, node)
    check_clients_options(recipe, node)
    trackers = trackers_of(node.track)
    ours = block(range(run.most_clients), group.rank, group.size)
    num_backs = len(recipe.scheme.backs_of(ours))
    devices = set_up_devices(node, num_backs, f"a server of --scheme {run.scheme}")
    past = common_past(_past_of(recipe, node), recipe, group)
    start = None if past else read_start(node.init, recipe)
    check_start(start, recipe)
    recipe = started(recipe, start)
    guard = guard_of(node, SERVER, run.most_clients)
    with transport.listen(node, run.clients) as listener:
        share = share_of(group, listener.port, node.advertise)
        begun = functools.partial(_prepare_folder, recipe, node, share)
        path, recipe, is_reused = in_turn(group, begun)
        run = recipe.run
        guard = dataclasses.replace(guard, run=run.run)
        with (
            running_at_end(node.on_end, path),
            contextlib.ExitStack() as stack,
            open_folder(path, SERVER_LOG, recipe.keep) as folder,
            transport.serve(listener, _terms(run, node), guard, _refusals(folder)) as network,
            reporting_failure(folder, network.end, hint_of(group, folder, run.model)),
        ):
            folder.events.prefix = f"rank {group.rank}: " if group.rank else ""
            place = _open_place(run, node, path, folder.events, removes_leftovers=is_reused)
            if node.fed_server:
                stack.enter_context(fed_server(node, run, past, transport))
            server = _Server(
                recipe, node, devices, folder, past, start, place, trackers, group, share
            )
            server.announce(listener.address, transport.notes(node))
            lobby = server.lobby(network, may_return=transport.may_return)
            stack.enter_context(lobby.notice)
            with LiveStatus(path, lambda: server.now(lobby)):
                rounds = server.prepare(lobby)
                stack.callback(rounds.spool.close)
                if place is not None and server.fed == HERE and node.resume:
                    _delete_weights(place, rounds)
                finish(rounds, folder)
    return path


def _terms(run: RunConfig, node: ServerNode) -> Terms:
    strangers = 2 * run.most_clients + 64  # all clients may connect and reconnect at once
    return Terms(
        node.peer_timeout, max_unregistered=strangers, heartbeat_s=interval_s(node.silence_s)
    )


def _refusals(folder: RunFolder) -> RefusalLog:
    return RefusalLog(folder.events.say, folder.events.note)


@dataclass
class _Server:
    """A server with open port, folder and store."""

    recipe: Recipe
    node: ServerNode
    devices: Devices
    folder: RunFolder
    past: Past | None
    start: StartWeights | None
    place: ObjectStore | None  # the store of weights
    trackers: Mapping[str, Tracker]
    group: Group
    share: Share
    rounds: Rounds | None = None  # once they are prepared

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    @property
    def fed(self) -> str:
        """Where the fed server is: HERE, APART, or HOST:PORT."""
        return HERE if self.node.role == "all" else self.node.fed_server or APART

    @cached_property
    def _fewest(self) -> int:
        """The fewest connected clients with which a round goes on."""
        return max(self.node.min_clients, fewest_connected(self.recipe))

    def announce(self, address: str, notes: Sequence[str]) -> None:
        """Log the run, the address, the number of clients, and notes about the transport."""
        events, past = self.folder.events, self.past
        events.note(f"command line: {' '.join(command_line())}")
        clients = self.share.ours(range(past.clients if past else self.run.clients))
        events.say(
            f"run {self.run.run}: listening on {address} for {counted(len(clients), 'client')}"
        )
        if past:
            _say_resume_state(past, self.recipe, events)
        if self.node.skip_after_s and self._fewest > self.node.min_clients:
            events.say(
                f"--aggregation {self.run.aggregation}: a round with fewer than {self._fewest}"
                " connected clients waits for others"
            )
        for line in notes:
            events.say(line)

    def now(self, lobby: Lobby) -> Now:
        """Return what the run does at the moment; called on another thread."""
        if self.rounds is None:
            return in_lobby(lobby.roster)
        return in_rounds(self.rounds, lobby.roster.loading())

    def prepare(self, lobby: Lobby) -> Rounds:
        """Register the clients, and return the rounds with them."""
        run, node, is_here = self.run, self.node, self.fed == HERE
        if self.past and self.past.is_over(self.recipe):  # only TRAINING_DONE is left to send
            lobby.end_soon()
        joined, ranks = lobby.gather(), self.group.ranks(lobby, self.folder.events)
        if self.past:
            self.past = _agree_on_round(self.past, joined, ranks, self.fed, self.folder.events)
        crash_point("start.ready")
        options = _store_options(run, node, self.folder.path, self.folder.events)
        make = store_maker(self.place, options, lobby.wake)
        self.rounds = rounds = Preparation(
            recipe=self.recipe,
            joined=joined,
            network=lobby,
            folder=self.folder,
            node=node,
            devices=self.devices,
            store=make if is_here else lambda link, most_bytes: Elsewhere(),
            past=self.past,
            start=self.start,
            trackers=self.trackers,
            options=RoundOptions(is_here, bool(node.skip_after_s), node.at_once),
            ranks=ranks,
        ).rounds()
        lobby.on_return, lobby.roster.num_samples = rounds.reconnect, rounds.num_samples
        if self.place is not None and self.fed == APART:
            put_start(
                self.place,
                run,
                rounds.first_round,
                describe_data(reports_of(joined), self.recipe),
            )
        return rounds

    def lobby(self, network: ServerNetwork, *, may_return: bool) -> Lobby:
        """Return the network of this run's clients."""
        recipe, node = self.recipe, self.node
        return Lobby(
            members=network,
            recipe=recipe,
            events=self.folder.events,
            resumed=bool(node.resume),
            fed=self.fed,
            task_servers=addresses_of(node.task_servers),
            share=self.share,
            secret=seal_secret(node),
            patience=Patience(may_return and self.fed == HERE, node.skip_after_s, self._fewest),
            admission=Admission(
                self.past, ServersModel(recipe), functools.partial(claim_error, recipe, node)
            ),
        )


def _delete_weights(place: ObjectStore, rounds: Rounds) -> None:
    """Delete stored weights of rounds that are repeated, if they may come out different."""
    if not (rounds.may_skip or rounds.run.server_order == "arrival"):
        return
    for path in place.names(f"{rounds.run.run}/round_"):
        if int(path.split("/")[1].removeprefix("round_")) >= rounds.first_round:
            place.delete(path)


def _past_of(recipe: Recipe, node: ServerNode) -> Past | None:
    """Return the state that a run resumes from; None if it starts from the beginning."""
    if not (node.resume and has_begun(Path(node.resume))):
        return None
    return open_past(Path(node.resume), recipe.run)


def _agree_on_round(
    past: Past, joined: Mapping[int, Joined], ranks: Ranks, fed: str, events: EventLog
) -> Past:
    """Keep only the checkpoint of the newest round that the server and all clients have.

    Raises:
        RunError: there is no such round.
    """
    rounds = {k: client.data.rounds for k, client in joined.items()}
    agreed = past.common_to_all(rounds, ranks)
    if agreed.first_round != past.first_round:
        why = f"a client has only what round {agreed.first_round + 1} starts from"
        if fed != HERE:
            raise RunError(f"{why}, and the fed server has begun with round {past.first_round + 1}")
        events.say(f"warning: {why}: all go back to it")
    return agreed


def _say_resume_state(past: Past, recipe: Recipe, events: EventLog) -> None:
    for damage in past.damage:
        events.say(f"warning: cannot go on from the newest checkpoint: {damage}")
    if past.is_over(recipe):
        events.say("all rounds are done")
    else:
        events.say(f"going on with round {past.first_round + 1}/{recipe.run.rounds}")


def _store_options(run: RunConfig, node: ServerNode, path: Path, events: EventLog) -> StoreOptions:
    scratch = path / "downloads"
    return StoreOptions(
        run.weights, scratch, node.weights_timeout, node.weights_timeout, events.say
    )


def _open_place(
    run: RunConfig, node: ServerNode, path: Path, events: EventLog, *, removes_leftovers: bool
) -> ObjectStore | None:
    """Open and check the store of weights, if the run has one.

    ``removes_leftovers``: delete the objects of an earlier, failed start of this run.
    """
    place = _store_options(run, node, path, events).open_place()
    if place is not None:
        place.check()
        events.say(f"weights go through {place.title}")
        found = place.names(f"{run.run}/") if removes_leftovers else []
        if any(name.startswith(f"{run.run}/round_") for name in found):
            raise ConfigError(f"{place.title} has rounds of a run {run.run}; give another --run")
        for name in found:
            place.delete(name)
    return place


def _prepare_folder(recipe: Recipe, node: ServerNode, share: Share) -> tuple[Path, Recipe, bool]:
    """Return the folder of this server's share of a run, the run's recipe by its name, and whether
    a failed start left the folder.

    The options are written first, so that the run can be resumed whenever it is killed.
    """
    if node.resume:
        return Path(node.resume), recipe, False
    name = recipe.run.run or new_run_name()
    own = share.folder(node.out_path / "server" / name)
    was_there = own.exists()
    path = create_run_folder(own.parent, own.name)
    recipe = recipe.changed(run=name)
    write_file(path / "config.json", to_json(options_record(recipe.run, node)), durable=True)
    remember([recipe.run.model])
    return path, recipe, was_there


def finish(rounds: Rounds, folder: RunFolder) -> dict[str, float]:
    """Run all rounds; log the result and the run's folder."""
    with rounds.log:
        figures = rounds.run_all()
    rounds.ranks.gather({})  # none is finished before all have let their clients go
    folder.archive.write("summary", "rounds.csv", (folder.path / "rounds.csv").read_bytes())
    folder.archive.flush()
    metric, title = rounds.recipe.task.shown
    if f"test_{metric}" in figures:
        shown, loss = figures[f"test_{metric}"], figures["test_loss"]
        folder.events.say_of_run(f"test {title} {shown:.4f}, test loss {loss:.4f}")
    else:
        folder.events.say_of_run(f"no client has a test set: there is no test {title}")
    folder.events.say_of_run(f"{RUN_OVER}{folder.path}")
    folder.archive.write("events", SERVER_LOG, (folder.path / SERVER_LOG).read_bytes())
    folder.archive.flush()
    rounds.ranks.leave()
    return figures
