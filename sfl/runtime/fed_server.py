"""Run the fed server as its own process; connect the main server to it."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import sfl.archive
from sfl.archive.run_folder import (
    SERVER_LOG as LOG,
)
from sfl.archive.run_folder import (
    RunFolder,
    make_folder,
    open_folder,
    options_record,
    reporting_failure,
    say,
    to_json,
)
from sfl.archive.writer import REWRITTEN
from sfl.config import RunConfig
from sfl.conversation.fed import (
    FedRounds,
    fed_join,
    find_start,
    main_join,
)
from sfl.conversation.join import Welcome, reports_of
from sfl.conversation.limits import server_limits
from sfl.conversation.party import TRAIN
from sfl.conversation.report import describe_data
from sfl.environment import command_line, describe, set_up_torch
from sfl.errors import ConfigError, SflError, counted
from sfl.files.torch_file import max_state_bytes
from sfl.model.topology import Holder, States
from sfl.nodes import ServerNode
from sfl.runtime.access import Access, closing_with_reason
from sfl.runtime.admission import Admission
from sfl.runtime.client_places import Patience
from sfl.runtime.lobby import Lobby
from sfl.runtime.memory import TRAINED_COPIES, sizes_of, why_too_large
from sfl.runtime.on_end import running_at_end
from sfl.runtime.report_limits import claim_error
from sfl.runtime.resume import Past, open_past, read_shared
from sfl.runtime.start_weights import read_start
from sfl.strategy.merge import Shared
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.guard import Terms, guard_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import FED
from sfl.transport.transports import ServerNetwork, Transport, transport_of
from sfl.trusted_imports import remember
from sfl.values import KEEP_NOTHING, KeepModels
from sfl.weights.exchange import SocketWeights, WeightStore
from sfl.weights.stored_weights import Threads
from sfl.weights.stores import SOCKET, StoreOptions, store_maker
from sfl.wire.driver import Conversation, Network, run_blocking, run_together
from sfl.wire.link import MAIN, Link, Peer, last_words_for
from sfl.wire.members import Member
from sfl.wire.messages import MessageType
from sfl.wire.payload import payload_store_in

LOOK_AGAIN_S = 1.0  # interval of polling a store for the main server's start


@contextlib.contextmanager
def fed_server(
    node: ServerNode, run: RunConfig, past: Past | None, transport: Transport
) -> Iterator[None]:
    """Hold the main server's connection to the fed server during a run.

    Raises:
        RunError: the fed server cannot be reached, or has failed.
    """
    with transport.client(node, say) as dialler, contextlib.ExitStack() as stack:
        access = Access.of(node, dialler)
        channel = stack.enter_context(dialler.connect(node.fed_server, patience_s=60.0))
        channel.name, channel.peer_name = "the main server", "the fed server"
        stack.enter_context(closing_with_reason(channel))
        access.authenticate(channel, Peer(MAIN), FED)
        first_round, heartbeat_s = past.first_round if past else 0, interval_s(node.peer_timeout)
        resumed = past is not None
        run_blocking(main_join(channel, run, first_round, resumed=resumed, heartbeat_s=heartbeat_s))
        yield
        channel.send_message_as_json(MessageType.UNREGISTER)
        channel.close_gracefully()


def serve_fed(run: RunConfig, node: ServerNode) -> Path:
    """Run a fed server for one run; return its folder.

    Raises:
        ConfigError: the options cannot be used together, or on this machine.
        RunError: the port, the folder or the store cannot be used.
        ProtocolError, IntegrityError, ConnectionLost, PeerFailed: from main server and clients.
    """
    device = set_up_torch(node)
    if run.weights == SOCKET:
        transport = transport_of(node)
        return _serve_connections(node, device, transport)
    return _serve_store(run, node, device)


def _folder(run: RunConfig, node: ServerNode, *, resumed: bool) -> Path:
    path = node.out_path / "fed" / run.run
    if not (resumed and path.is_dir()) and not make_folder(path, LOG):
        raise ConfigError(f"a run {run.run} exists in {path.parent}")
    return path


def _serve_connections(node: ServerNode, device: torch.device, transport: Transport) -> Path:
    guard = guard_of(node, FED)
    with (
        transport.listen(node, 0) as listener,
        transport.serve(listener, Terms(node.peer_timeout), guard, RefusalLog(say)) as network,
    ):
        for warning in transport.notes(node):
            say(warning)
        say(f"fed server: listening on {listener.address} for the main server")
        welcome, recipe, main = _await_main(network, node)
        run = recipe.run
        guard.run = run.run
        path = _folder(run, node, resumed=welcome.resumed)
        with (
            running_at_end(node.on_end, path),
            open_folder(path, LOG, _kept_models(recipe)) as folder,
            reporting_failure(folder, network.end),
        ):
            folder.events.say(f"run {run.run}: {main.address} is the main server")
            past = open_past(path, run).at(welcome.first_round) if welcome.resumed else None
            lobby = Lobby(
                members=network,
                recipe=recipe,
                events=folder.events,
                resumed=welcome.resumed,
                patience=Patience(may_return=False),
                admission=Admission(past, claim_error=functools.partial(claim_error, recipe, node)),
            )
            joined = lobby.gather()
            data = describe_data(reports_of(joined), recipe)
            split = _model(recipe, node, data)
            stores: dict[int, WeightStore] = {k: SocketWeights(c.link) for k, c in joined.items()}
            rounds = _prepare(
                split,
                network,
                stores,
                node=node,
                folder=folder,
                data=data,
                past=past,
                device=device,
            )
            for connection in network.members:
                connection.limits = server_limits(rounds.split, 0, payload_store_in(folder.path))
            rounds.run_all()
            links = {k: c.link for k, c in joined.items()} | {-1: main}
            goodbyes = {k: functools.partial(_goodbye, link) for k, link in links.items()}
            run_together(network, goodbyes)
            _finish(folder)
    return path


def _serve_store(run: RunConfig, node: ServerNode, device: torch.device) -> Path:
    if not run.run:
        raise ConfigError("--role fed: say with --run which run of the store it is")
    path = node.out_path / "fed" / run.run
    scratch = path.parent / f".{run.run}.downloads"  # the run's folder does not exist yet
    options = StoreOptions(run.weights, scratch, node.weights_timeout, math.inf, say)
    place = options.open_place()
    assert place is not None
    place.check()
    past = open_past(path, run) if node.resume else None
    if node.resume and Path(node.resume).resolve() != path.resolve():
        raise ConfigError(f"--resume {node.resume}: this run lies in {path}; see --out and --run")
    done = past.first_round if past else 0
    say(f"fed server: waiting in {place.title} for the run {run.run}")
    while (found := find_start(place, run.run, done)) is None:
        time.sleep(LOOK_AGAIN_S)
    first_round, their_run, data = found
    recipe = Recipe.of(their_run, node.allowed_imports)
    _folder(their_run, node, resumed=past is not None)
    network = Threads()
    with (
        running_at_end(node.on_end, path),
        open_folder(path, LOG, _kept_models(recipe)) as folder,
        reporting_failure(folder),
    ):
        make = store_maker(place, options, network.wake)
        split = _model(recipe, node, data)
        most_bytes = max_state_bytes(split.front_spec)
        stores = {int(k): make(None, most_bytes) for k in sorted(data["num_samples"], key=int)}
        rounds = _prepare(
            split, network, stores, node=node, folder=folder, data=data, past=past, device=device
        )
        if past and first_round < done:  # the main server resumes from an earlier round
            start = read_shared(sfl.archive.open(path), rounds.split, first_round)
            rounds.publish_initial(start, first_round)
        rounds.run_all()
        _finish(folder)
    return path


def _kept_models(recipe: Recipe) -> KeepModels:
    """Return which models are kept: one more, as the main server may resume a round earlier."""
    return dataclasses.replace(recipe.keep, tensors=KEEP_NOTHING, behind=1)


def _model(recipe: Recipe, node: ServerNode, data: Mapping[str, Any]) -> SplitModel:
    """Build the model that the main server's run names, within this machine's limits."""
    run = recipe.run
    remember({run.model} & node.allowed_imports)
    shape, num_classes = tuple(data["input_shape"]), len(data["classes"])
    sizes = sizes_of(recipe, shape, num_classes)
    weights = sizes.whole + (2 * len(data["num_samples"]) + TRAINED_COPIES) * sizes.front
    if why := why_too_large({"weights": weights}, node, f"the main server's --model {run.model}"):
        raise ConfigError(why)
    return SplitModel(recipe, shape, num_classes)


def _prepare(
    split: SplitModel,
    network: Network,
    stores: Mapping[int, WeightStore],
    *,
    node: ServerNode,
    folder: RunFolder,
    data: Mapping[str, Any],
    past: Past | None,
    device: torch.device,
) -> FedRounds:
    """Record configuration and environment, and load the weights that the run starts from."""
    run, archive = split.recipe.run, folder.archive
    shared = read_shared(past.files, split, past.first_round) if past else {}
    shared = shared or _initial(split, node, folder)
    archive.discard_from(past.first_round if past else 0, rewritten=REWRITTEN)
    environment = describe(device, command_line()) | {"data": dict(data)}
    about = {"data": dict(data), "fingerprint": environment["fingerprint"]}
    archive.write("config", "config.json", to_json(options_record(run, node)))
    archive.write("environment", "environment.json", to_json(environment))
    num_train = {int(k): parts[TRAIN] for k, parts in data["num_samples"].items()}
    folder.events.say(f"averaging the fronts of {counted(len(stores), 'client')}")
    first_round = past.first_round if past else 0
    return FedRounds(network, stores, num_train, split, folder, shared, about, first_round)


def _initial(split: SplitModel, node: ServerNode, folder: RunFolder) -> dict[str, Shared]:
    """Return the fronts' weights that a new run starts from, like the main server's backs."""
    initial: States = split.initial(Holder.CLIENT)
    run = split.recipe.run
    if node.init and not run.init_checksum:
        raise ConfigError(f"--init {node.init}: the main server was started without --init")
    if start := read_start(node.init, split.recipe):
        folder.events.say(start.line(split))
        initial = start.into(split, initial)
    return {name: Shared(state) for name, state in initial.items()}


def _await_main(network: ServerNetwork, node: ServerNode) -> tuple[Welcome, Recipe, Member]:
    """Wait until the main server has connected; refuse all others until then.

    Raises:
        ConfigError: this machine cannot build the main server's run.
    """
    joining: dict[Member, Conversation[tuple[Welcome, Recipe]]] = {}

    def recipe_of(run: RunConfig) -> Recipe:
        return Recipe.of(run, node.allowed_imports)

    while True:
        for connection in network.wait_until(network.ready_members, 1.0) or []:
            if connection not in joining:
                connection.name = "the fed server"
                joining[connection] = fed_join(connection, network.heartbeat_s, recipe_of)
                next(joining[connection])
            try:
                next(joining[connection])
            except StopIteration as end:
                return *end.value, connection
            except SflError as error:
                network.drop(connection, str(error), last_words_for(error))
                if isinstance(error, ConfigError):  # our own options do not fit the run
                    raise


def _goodbye(link: Link) -> Conversation[None]:
    yield link
    link.receive_message_as_json(MessageType.UNREGISTER)


def _finish(folder: RunFolder) -> None:
    """Log the run's folder, and list the log in the manifest."""
    folder.events.say(f"the fronts lie in {folder.path}")
    folder.archive.write("events", LOG, (folder.path / LOG).read_bytes())
    folder.archive.flush()
