"""The fed server as its own process: it averages the clients' fronts and never sees the back.

Over TCP the main server sends it the run's configuration, and each client opens a second
connection, to the fed server::

    main server (main_join)                          fed server (fed_join)
    REGISTER {config, round, goes_on}            ->
                                                 <-  REGISTERED {heartbeat_s}
    (then sends its clients the fed server's address)
    UNREGISTER                                   ->  when the run is over; ABORT if it fails

    client                                           fed server
    REGISTER, REQUEST_TO_START as for the main server
                                                 <-  initial weights
    in each round that the client takes part in:
    the client's weights                         ->
                                                     merge
                                                 <-  the averaged weights
    UNREGISTER                                   ->

With a folder or a bucket the fed server needs no port: it reads the run's configuration from an
object there, and polls for the clients' weights.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sfl.archive.layout import ONE_CLIENT_MODEL, segment_path
from sfl.archive.manifest import ROUND_LOG
from sfl.archive.records import data_of
from sfl.archive.round_log import write_table
from sfl.archive.run_folder import RunFolder
from sfl.config import RunConfig
from sfl.conversation.join import Welcome, parse_heartbeat
from sfl.errors import ConfigError, IntegrityError, ProtocolError, counted, quoted
from sfl.files import strict_json
from sfl.files.checksum import checksum
from sfl.files.torch_file import decode_state, encode_state
from sfl.model.finite_check import check_finite
from sfl.model.topology import States, joined
from sfl.options import from_values
from sfl.strategy.merge import Shared, Trained, averaging_weights, merge, shared_files
from sfl.strategy.order import Turns, draw
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Fronts
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.weights.exchange import (
    AVERAGE,
    INITIAL,
    NamedWeights,
    WeightKey,
    WeightStore,
    client_weights,
)
from sfl.weights.object_store import ObjectStore
from sfl.wire.driver import Conversation, Network, run_together
from sfl.wire.link import ANY_ID, MAIN, Link, Peer
from sfl.wire.messages import MessageType


def main_join(
    link: Link, run: RunConfig, first_round: int, *, resumed: bool, heartbeat_s: float
) -> Conversation[None]:
    """Send the fed server the run's configuration; faces ``fed_join``."""
    content = {"role": MAIN, "config": dataclasses.asdict(run), "round": first_round}
    content |= {"goes_on": resumed, "heartbeat_s": heartbeat_s}
    link.send_message_as_json(MessageType.REGISTER, content=content)
    yield link
    link.heartbeat_s = parse_heartbeat(link.receive_message_as_json(MessageType.REGISTERED))


def fed_join(
    link: Link, heartbeat_s: float, recipe_of: Callable[[RunConfig], Recipe]
) -> Conversation[tuple[Welcome, Recipe]]:
    """Receive the run's configuration from the main server; faces ``main_join``.

    The returned ``Welcome`` is what the fed server's clients are told.

    Raises:
        ProtocolError: the peer is not the main server, or its message is invalid.
        ConfigError: ``recipe_of`` cannot build the run on this machine.
    """
    yield link
    hello = link.receive_message_as_json(MessageType.REGISTER)
    if not isinstance(hello.content, dict) or hello.content.get("role") != MAIN:
        raise ProtocolError("the main server has not come yet")
    link.check_proved(Peer(MAIN))
    try:
        run = from_values(RunConfig, hello.get("config", dict), "the main server's configuration")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    if not run.run or not 0 <= (first_round := hello.get("round", int)) < run.rounds:
        raise ProtocolError(f"the main server starts no run: {run.run!r}")
    recipe = recipe_of(run)
    link.heartbeat_s = parse_heartbeat(hello)
    link.peer_name = "the main server"
    link.send_message_as_json(MessageType.REGISTERED, content={"heartbeat_s": heartbeat_s})
    return Welcome(ANY_ID, run, first_round, hello.get("goes_on", bool)), recipe


MOST_CONFIG_BYTES = 2**20


def put_start(
    place: ObjectStore, run: RunConfig, first_round: int, data: Mapping[str, Any]
) -> None:
    """Write the run's configuration and the description of its clients' data to a store.

    Each start of the main server writes one object, named by its first round and number of rounds.
    """
    content = json.dumps({"config": dataclasses.asdict(run), "data": data}, sort_keys=True).encode()
    path = f"{run.run}/starts/{first_round:06d}_{run.rounds:06d}"
    place.create(path, content, {"run": run.run, "checksum": checksum(content)})


def find_start(
    place: ObjectStore, run: str, done: int
) -> tuple[int, RunConfig, dict[str, Any]] | None:
    """Find the main server's last start that has rounds left after ``done`` rounds, if any.

    Returns its first round, its configuration and the description of its clients' data.

    Raises:
        IntegrityError: the object is damaged, or belongs to another run.
    """
    for path in reversed(place.names(f"{run}/starts/")):
        numbers = re.fullmatch(r"(\d{6,9})_(\d{6,9})", path.rpartition("/")[2], re.ASCII)
        if numbers and int(numbers[2]) > done >= int(numbers[1]):
            found = place.read(path, MOST_CONFIG_BYTES)
            if found is not None:
                return int(numbers[1]), *_parse_start(f"{place.title}/{path}", run, *found)
    return None


def _parse_start(
    where: str, name: str, data: bytes, metadata: Mapping[str, str]
) -> tuple[RunConfig, dict[str, Any]]:
    if metadata.get("checksum") != checksum(data):
        raise IntegrityError(f"{where}: is damaged")
    try:
        values = strict_json.loads(data)
        run = from_values(RunConfig, values["config"], where)
        described = data_of(values["data"])
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise IntegrityError(f"{where}: is damaged: {error}") from error
    if run.run != name:
        raise IntegrityError(f"{where}: is of the run {quoted(run.run, 70)}")
    return run, described


@dataclass
class FedRounds:
    """The fed server's part of a run."""

    network: Network
    stores: Mapping[int, WeightStore]  # in the order of the clients
    num_train: Mapping[int, int]
    split: SplitModel
    folder: RunFolder
    shared: dict[str, Shared]  # the clients' segments at the start of the next round
    about: Mapping[str, Any]  # further content of a checkpoint
    first_round: int = 0
    _paths: list[str] = field(default_factory=list)  # files of ``shared``

    @property
    def run(self) -> RunConfig:
        return self.split.recipe.run

    def run_all(self) -> None:
        """Publish the initial weights, then average the clients' fronts round by round."""
        keeps_own = self.split.recipe.scheme.fronts is Fronts.OWN
        if self.first_round == 0:
            self._write_shared(-1)
            self._commit(0)
        if not (keeps_own and self.first_round):
            self.publish_initial(self.shared, self.first_round)
        if keeps_own:
            return
        for round_index in range(self.first_round, self.run.rounds):
            self._round(round_index)
        self.folder.check_exists()

    def _at(self, client: int, round_index: int) -> Position:
        return Position(self.run.run, round_index, -1, client)

    def publish_initial(self, shared: Mapping[str, Shared], first_round: int) -> None:
        """Publish the weights with which clients start their first round."""
        self._publish(INITIAL, shared, first_round - 1, 0)

    def _publish(
        self, name: str, shared: Mapping[str, Shared], round_index: int, samples: int
    ) -> None:
        """Publish weights, trained on ``samples`` samples, to all clients."""
        data = encode_state(joined({n: one.state for n, one in shared.items()}))
        keys = {k: WeightKey(name, self._at(k, round_index)) for k in self.stores}
        puts = {
            k: functools.partial(store.put, keys[k], data, samples)
            for k, store in self.stores.items()
        }
        run_together(self.network, puts)

    def _round(self, round_index: int) -> None:
        """Collect the fronts of the round's clients, merge them and publish the result."""
        self.folder.check_exists()
        archive, policy = self.folder.archive, self.split.recipe.scheme.fronts
        order = draw(self.run, list(self.stores), round_index)
        turns = Turns(order if policy is Fronts.RELAYED else None)
        relay: list[NamedWeights] = []
        collect = {k: functools.partial(self._collect, k, round_index, turns, relay) for k in order}
        fronts = run_together(self.network, collect)
        for k in sorted(fronts):
            for name, state in fronts[k].items():
                path = segment_path(ONE_CLIENT_MODEL, name, round_index, client=k)
                archive.write("one_client_model", path, encode_state(state), round_index)
        weights = averaging_weights(self.run, {k: self.num_train[k] for k in sorted(order)})
        trained = Trained(fronts, {}, weights, last=order[-1])
        self.shared = merge(self.split.recipe, self.shared, trained, self.split.entries)
        self._write_shared(round_index)
        name = f"client_{{}}_{round_index:03d}.pt"
        rows = [(k, name.format(k), "samples", n, round_index, "") for k, n in weights.items()]
        path = f"rounds/round_{round_index:03d}.csv"
        archive.write(ROUND_LOG, path, write_table(rows), round_index, tuple(order))
        archive.end_round(round_index)
        self._commit(round_index + 1)  # before the main server can commit the round
        if policy is Fronts.AVERAGED:
            self._publish(AVERAGE, self.shared, round_index, sum(self.num_train[k] for k in order))
        else:
            self._relay_last(relay[-1], round_index)
        self.folder.events.say(
            f"round {round_index + 1}/{self.run.rounds}: {counted(len(fronts), 'front')}"
            f" {policy.name.lower()}"
        )

    def _write_shared(self, round_index: int) -> None:
        files = [f for item in self.shared.items() for f in shared_files(*item, round_index)]
        for kind, path, data in files:
            self.folder.archive.write(kind, path, data, round_index)
        self._paths = [path for _, path, _ in files]

    def _commit(self, round_index: int) -> None:
        self.folder.archive.commit(round_index, asdict(self.run), self.about, self._paths)
        self.folder.archive.flush()

    def _collect(
        self, client: int, round_index: int, turns: Turns, relay: list[NamedWeights]
    ) -> Conversation[States]:
        """Collect a client's front; in a relay, first pass the preceding client's front to it."""
        store, at, name = self.stores[client], self._at(client, round_index), client_weights(client)
        yield turns.of(client)
        if relay:
            yield from store.pass_on(WeightKey(relay[-1].name, at), relay[-1].data)
        data = yield from store.get(WeightKey(name, at))
        title = f"the weights of client {client}"
        state = decode_state(data, self.split.front_spec, title)
        changing = self.split.changing(state)
        check_finite(changing, title, self.run.on_nonfinite, self.folder.events.say)
        if turns.in_order:
            relay.append(NamedWeights(name, encode_state(state)))
            turns.done()
        return self.split.by_segment(state)

    def _relay_last(self, last: NamedWeights, round_index: int) -> None:
        """Pass the last front of a relay to all other clients."""
        others = {k: s for k, s in self.stores.items() if client_weights(k) != last.name}
        keys = {k: WeightKey(last.name, self._at(k, round_index)) for k in others}
        passing = {
            k: functools.partial(store.pass_on, keys[k], last.data) for k, store in others.items()
        }
        run_together(self.network, passing)
