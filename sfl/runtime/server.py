"""The server: listen, gather the clients, run the rounds, say goodbye."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sfl.archive.profile import Profile
from sfl.archive.round_log import RoundLog
from sfl.archive.run_folder import (
    SERVER_LOG,
    EventLog,
    RunFolder,
    create_run_folder,
    how_to_go_on,
    open_folder,
    options_record,
    telling_why,
    to_json,
)
from sfl.archive.spool import Spool
from sfl.archive.writer import REWRITTEN
from sfl.config import RunConfig
from sfl.conversation.fed import put_start
from sfl.conversation.join import APART, HERE, Joined, describe_data
from sfl.conversation.party import TRAIN, ServerParty
from sfl.crash import crash_point
from sfl.environment import command_line, describe, differences, fingerprint, set_up_torch
from sfl.errors import ConfigError, RunError, counted
from sfl.files.atomic import write_file
from sfl.files.torch_file import max_state_bytes
from sfl.model.topology import Holder
from sfl.nodes import NodeConfig, ServerNode
from sfl.own_functions import remember
from sfl.runtime.claims import why_refused
from sfl.runtime.fed_server import fed_server
from sfl.runtime.lobby import Lobby
from sfl.runtime.places import Patience
from sfl.runtime.preflight import check_disk, check_run, check_space, disk_bytes, knows_classes
from sfl.runtime.resume import (
    Past,
    check_unfinished,
    has_begun,
    load_backs,
    open_past,
    read_shared,
)
from sfl.runtime.rounds import Rounds
from sfl.runtime.same_model import ServersModel, check_same_model
from sfl.strategy.merge import Shared
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import check_model
from sfl.transport.dialling import listen
from sfl.transport.guard import exposure, guard_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.switchboard import Switchboard
from sfl.transport.tokens import SERVER
from sfl.transport.turned_away import TurnedAway
from sfl.weights.exchange import Elsewhere, WeightStore
from sfl.weights.objects import ObjectStore
from sfl.weights.stores import SOCKET, StoreOptions, store_maker
from sfl.wire.driver import Network
from sfl.wire.link import Absent, Link
from sfl.wire.messages import Limits
from sfl.wire.payload import onto


def serve(run: RunConfig, node: ServerNode) -> Path:
    """Run a server from the first connection to the last, and return the run's folder.

    Raises:
        ConfigError: the run cannot be run as it was configured.
        RunError: port, folder or disk; or a client left.
        ProtocolError, IntegrityError, ConnectionLost, PeerFailed: from the clients.
    """
    # Of a run that goes on, the folder may be somebody else's.
    recipe = check_run(run, imports_data=not node.resume)
    run = recipe.run
    if recipe.scheme.pooled:
        raise ConfigError(
            f"--scheme {run.scheme} pools all data in one process: python -m experiments.simulate"
        )
    check_role(recipe, node)
    _check_together(recipe, node)
    device = set_up_torch(node)
    past = _past(run, node)
    guard = guard_of(node, SERVER, run.most_clients)
    with listen(node.host, node.port, node.link_shape) as listener, contextlib.ExitStack() as stack:
        path, recipe, is_taken_over = _folder_of(recipe, node)
        run = recipe.run
        fed = HERE if node.role == "all" else node.fed_server or APART
        with (
            open_folder(path, SERVER_LOG, recipe.keep) as folder,
            Switchboard(
                listener,
                timeout_s=node.peer_timeout,
                limits=Limits(),  # no files from anybody before the model is known
                max_strangers=2 * run.most_clients + 64,  # all clients at once, and again
                heartbeat_s=interval_s(node.silence_s),
                guard=dataclasses.replace(guard, run=run.run),
                turned_away=TurnedAway(folder.events.say, folder.events.note),
            ) as switchboard,
            telling_why(folder, switchboard.end, how_to_go_on(path, run.model)),
        ):
            events = folder.events
            place = _check_place(run, node, path, events, anew=is_taken_over)
            if node.fed_server:
                stack.enter_context(fed_server(node, run, past))
            events.note(f"command line: {' '.join(command_line())}")
            needed = past.clients if past else run.clients
            events.say(
                f"run {run.run}: listening on {listener.address} for {counted(needed, 'client')}"
            )
            if past:
                _say_how_it_goes_on(past, run, events)
            for line in exposure(node):
                events.say(line)
            patience = Patience(fed == HERE, node.skip_after_s, node.min_clients)
            lobby = Lobby(
                switchboard=switchboard,
                recipe=recipe,
                events=events,
                past=past,
                goes_on=bool(node.resume),
                fed=fed,
                patience=patience,
                model=ServersModel(recipe),
                why_refused=functools.partial(why_refused, recipe, node),
            )
            if past and past.first_round == run.rounds:  # all that is left is to say goodbye
                lobby.end_soon()
            joined = lobby.gather()
            if past:
                past = _agree(past, joined, fed, events)
            crash_point("start.ready")
            make = store_maker(place, _store_options(run, node, path, events), switchboard.wake)
            rounds = prepare(
                recipe, joined, lobby, folder, device=device, node=node, past=past,
                store=make if fed == HERE else lambda link, most_bytes: Elsewhere(),
                with_fronts=fed == HERE, may_skip=bool(node.skip_after_s), at_once=node.at_once,
            )  # fmt: skip
            stack.callback(rounds.spool.close)
            lobby.on_return = rounds.come_back
            if place is not None and fed == APART:
                put_start(place, run, rounds.first_round, describe_data(joined, run))
            if place is not None and fed == HERE and node.resume:
                _forget_weights(place, rounds)
            finish(rounds, folder)
    return path


def _check_together(recipe: Recipe, node: ServerNode) -> None:
    """See that what the server's options say of the clients goes with the run."""
    run = recipe.run
    if node.min_clients > run.most_clients:
        raise ConfigError(f"--min-clients {node.min_clients}: there are {run.most_clients}")
    if node.at_once and not recipe.scheme.copies_back:
        raise ConfigError(
            f"--at-once {node.at_once}: with {run.scheme} nobody has a copy to wait for"
        )


def _forget_weights(place: ObjectStore, rounds: Rounds) -> None:
    """Remove the weights of rounds that are done again, if they may become others."""
    if not (rounds.may_skip or rounds.run.server_order == "arrival"):
        return
    for path in place.names(f"{rounds.run.run}/round_"):
        if int(path.split("/")[1].removeprefix("round_")) >= rounds.first_round:
            place.delete(path)


def _past(run: RunConfig, node: ServerNode) -> Past | None:
    """Return what a run goes on from; None if it is to begin, where it lies or elsewhere."""
    if not (node.resume and has_begun(Path(node.resume))):
        return None
    past = open_past(Path(node.resume), run)
    check_unfinished(past, run)
    return past


def _agree(past: Past, joined: Mapping[int, Joined], fed: str, events: EventLog) -> Past:
    """Return what goes on with the newest round that the server and all clients have.

    Raises:
        RunError: there is none.
    """
    agreed = past.that_all_have({k: client.data.rounds for k, client in joined.items()})
    if agreed.first_round != past.first_round:
        why = f"a client has only what round {agreed.first_round} starts from"
        if fed != HERE:
            raise RunError(f"{why}, and the fed server has begun with {past.first_round}")
        events.say(f"warning: {why}: all go back to it")
    return agreed


def _say_how_it_goes_on(past: Past, run: RunConfig, events: EventLog) -> None:
    for damage in past.damage:
        events.say(f"warning: cannot go on from the newest checkpoint: {damage}")
    if past.first_round < run.rounds:
        events.say(f"going on with round {past.first_round + 1}/{run.rounds}")
    else:
        events.say("all rounds are done")


def check_role(recipe: Recipe, node: ServerNode) -> None:
    """See that the servers of a run can be apart as this one is told.

    Raises:
        ConfigError: they cannot.
    """
    if node.role != "main":
        return
    run = recipe.run
    if recipe.scheme.exchange is Exchange.WEIGHT_GRADS:
        raise ConfigError(
            f"--role main: in --scheme {run.scheme} the server updates all weights; there is no"
            " fed server to part from"
        )
    if (run.weights == SOCKET) != bool(node.fed_server):
        raise ConfigError(
            "--role main needs to know where the fed server is: give --fed-server HOST:PORT, or"
            " let the weights go through a store, --weights dir:PATH or gs://BUCKET/PREFIX"
        )


def _store_options(run: RunConfig, node: ServerNode, path: Path, events: EventLog) -> StoreOptions:
    scratch = path / "downloads"
    return StoreOptions(
        run.weights, scratch, node.weights_timeout, node.weights_timeout, events.say
    )


def _check_place(
    run: RunConfig, node: ServerNode, path: Path, events: EventLog, *, anew: bool
) -> ObjectStore | None:
    """Open the place that keeps the weights, if there is one, and see that it can be used.

    ``anew``: what a start of this run that failed has left there is removed.
    """
    place = _store_options(run, node, path, events).open_place()
    if place is not None:
        place.check()
        events.say(f"weights go through {place.title}")
        found = place.names(f"{run.run}/") if anew else []
        if any(name.startswith(f"{run.run}/round_") for name in found):
            raise ConfigError(f"{place.title} has rounds of a run {run.run}; give another --run")
        for name in found:
            place.delete(name)
    return place


def _folder_of(recipe: Recipe, node: ServerNode) -> tuple[Path, Recipe, bool]:
    """Return the folder of the run, new or resumed, the run by its name, and whether the folder is
    that of a start that failed.

    The options lie in it before anything else, so that the run can go on whenever it is killed.
    """
    if node.resume:
        return Path(node.resume), recipe, False
    run = recipe.run
    parent = node.out_path / "server"
    was_there = bool(run.run) and (parent / run.run).exists()
    path = create_run_folder(parent, run.run)
    recipe = recipe.changed(run=path.name)
    write_file(path / "config.json", to_json(options_record(recipe.run, node)), durable=True)
    remember([run.model])
    return path, recipe, was_there


def prepare(
    recipe: Recipe,
    joined: Mapping[int, Joined],
    network: Network,
    folder: RunFolder,
    *,
    device: torch.device,
    node: NodeConfig,
    store: Callable[[Link, int], WeightStore],
    past: Past | None = None,
    with_fronts: bool = True,
    may_skip: bool = False,
    at_once: int = 0,
    keeps_answers: bool = True,
) -> Rounds:
    """Build the model for the clients' data, record configuration and machines, check the disk.

    ``store`` makes the store of weights for a client's link, with files of at most so many bytes.
    Without ``with_fronts`` another server has the fronts, and none of them lie here. ``may_skip``:
    rounds may close without a client; ``at_once``: so many train at the same time, see ``Rounds``;
    ``keeps_answers``: a client may redo its steps.

    Raises:
        ConfigError: the model does not take such data, or cannot be trained in its segments.
        RunError: the clients' data do not go together, or the disk is too small.
        IntegrityError: a file that the run goes on from is damaged.
    """
    run, archive, events = recipe.run, folder.archive, folder.events
    data = dict(past.data) if past else describe_data(joined, run)
    split = SplitModel.of_data(recipe, data)
    check_same_model(split, joined, events.say)
    _look_at(split, run, events)
    ours = fingerprint(device)
    for k, client in joined.items():
        for difference in differences(ours, client.fingerprint):
            events.say(
                f"warning: client_{k} has {difference} of the server: the last bit may differ"
            )
    if past:
        for difference in differences(past.fingerprint, ours):
            events.say(f"warning: {difference} of the run so far: the last bit may differ")
    first_round = past.first_round if past else 0
    archive.begin_at(first_round, anew=REWRITTEN)
    clients = {f"client_{k}": dict(client.fingerprint) for k, client in joined.items()}
    environment = describe(device, command_line()) | {"clients": clients, "data": data}
    known = past.client_fingerprints if past else {}
    fingerprints = dict(known) | {k: dict(client.fingerprint) for k, client in joined.items()}
    archive.write("config", "config.json", to_json(options_record(run, node)))
    archive.write("environment", "environment.json", to_json(environment))
    num_samples = {int(k): parts for k, parts in data["num_samples"].items()}
    num_train = [parts[TRAIN] for parts in num_samples.values()]
    left = recipe.changed(rounds=run.rounds - first_round)
    events.say(
        check_disk(
            folder.path, left, lambda recipe: disk_bytes(recipe, split, num_train),
            may_change=not past,
        )
    )  # fmt: skip
    row = recipe.scheme
    has_backs = row.exchange is not Exchange.NOTHING
    indices = sorted({row.back_of(k) for k in num_samples}) if has_backs else []
    backs = {b: split.segments(Holder.SERVER, device) for b in indices}
    if past:
        shared = read_shared(past.files, split, first_round)
        load_backs(past.files, run, backs, shared, first_round)
    else:
        holders = tuple(Holder) if with_fronts else (Holder.SERVER,)
        shared = {name: Shared(state) for name, state in split.initial(*holders).items()}
    a_round = disk_bytes(recipe.changed(rounds=1), split, num_train)
    log = RoundLog(folder, run.rounds, recipe.task, first_round)
    most_bytes = max_state_bytes(split.front_spec)
    profile = Profile(folder.path, wanted=node.profile)

    def store_of(link: Link) -> WeightStore:
        return store(link, most_bytes)

    links = {k: joined[k].link if k in joined else Absent(k) for k in num_samples}
    parties = {
        k: ServerParty(
            client=k,
            recipe=recipe,
            link=links[k],
            weights=store_of(links[k]),
            split=split,
            archive=archive,
            watcher=log,
            profile=profile,
            backs=backs,
            num_samples=num_samples[k],
            own_round=past.own_rounds.get(k, 0) if past else 0,
        )
        for k in sorted(num_samples)
    }
    rounds = Rounds(
        network,
        parties,
        backs,
        split,
        archive,
        log,
        shared,
        store=store_of,
        spool=Spool(folder.path if keeps_answers else None, archive.flush),
        payloads=onto(folder.path),
        about={"data": data, "fingerprint": ours, "clients": fingerprints},
        check_there=folder.check_there,
        check_space=lambda: check_space(folder.path, a_round),
        first_round=first_round,
        may_skip=may_skip,
        at_once=at_once,
    )
    for k in parties:
        rounds.limit(k)
    return rounds


def _look_at(split: SplitModel, run: RunConfig, events: EventLog) -> None:
    """Try the model if that could not be done before, and say what is unusual about it."""
    if not knows_classes(run):
        check_model(split)
    if split.is_in_eval:
        events.say(
            "warning: the model came in eval() and stays in it while it is trained: it has no"
            " dropout, and BatchNorm keeps its statistics"
        )
    if not split.front_spec:
        events.say("warning: the front has no weights: what clients send are their raw data")


def finish(rounds: Rounds, folder: RunFolder) -> dict[str, float]:
    """Run all rounds, and say how the run ended and where it lies."""
    try:
        figures = rounds.run_all()
    finally:
        rounds.log.progress.close()
    folder.archive.write("summary", "rounds.csv", (folder.path / "rounds.csv").read_bytes())
    folder.archive.flush()
    metric, title = rounds.recipe.task.shown
    if f"test_{metric}" in figures:
        shown, loss = figures[f"test_{metric}"], figures["test_loss"]
        folder.events.say(f"test {title} {shown:.4f}, test loss {loss:.4f}")
    else:
        folder.events.say(f"no client has a test set: there is no test {title}")
    folder.events.say(f"the run lies in {folder.path}")
    folder.archive.write("events", SERVER_LOG, (folder.path / SERVER_LOG).read_bytes())
    folder.archive.flush()
    return figures
