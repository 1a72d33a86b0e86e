"""The exchange of weights that ends a round, of a server and clients on threads of this process."""

import contextlib
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from sfl.archive.run_folder import say
from sfl.errors import SflError
from sfl.files.torch_file import (
    StateSpec,
    decode_state,
    encode_state,
    max_state_bytes,
    state_spec,
)
from sfl.strategy.aggregate import State, fed_avg
from sfl.transport.connecting import Dialling
from sfl.transport.guard import Terms
from sfl.transport.listener import listen
from sfl.transport.tcp_client import TcpClient
from sfl.transport.tcp_server import TcpServer
from sfl.values import Position
from sfl.weights.exchange import AVERAGE, WeightKey, WeightStore, client_weights
from sfl.weights.stores import StoreOptions, store_maker
from sfl.wire.driver import Conversation, run_blocking, run_together
from sfl.wire.link import Link
from sfl.wire.messages import Limits, MessageType


def client(k: int, port: int, timing: "Timing") -> None:
    """Give a front and take the average back, each round."""
    options = timing.options(str(k))
    with (
        timing.failing(),
        TcpClient(Dialling(120, on_wait=say, limits=timing.limits)) as dialler,
        dialler.connect(f"127.0.0.1:{port}", 10) as link,
    ):
        link.send_message_as_json(MessageType.REGISTER, content=k)
        store = store_maker(options.open_place(), options)(link, timing.most_bytes)
        for r in range(timing.rounds):
            front = encode_state({"w": timing.front["w"] + k})
            run_blocking(store.put(timing.key(client_weights(k), k, r), front))
            average = run_blocking(store.get(timing.key(AVERAGE, k, r)))
            decode_state(average, timing.spec, "the average")
            timing.everyone_has_it.wait()


class Timing:
    """What server and clients of one measurement share."""

    def __init__(self, address: str, options: Namespace, folder: Path) -> None:
        self.front = {"w": torch.randn(int(options.megabytes * 1e6) // 4)}
        self.spec = state_spec(self.front)
        self.rounds = options.rounds
        self.everyone_has_it = threading.Barrier(options.clients + 1)
        self.failure: SflError | None = None
        self._address, self._folder, self._run = address, folder, uuid.uuid4().hex
        weights = (MessageType.SEND_MODEL, MessageType.SEND_AGGREGATED_MODEL)
        self.most_bytes = max_state_bytes(self.spec)
        self.limits = Limits(payload_bytes=dict.fromkeys(weights, self.most_bytes))

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Let a client's failure end the measurement; the server says why."""
        try:
            yield
        except SflError as error:
            self.failure = error
            self.everyone_has_it.abort()

    def key(self, name: str, client: int, round_index: int) -> WeightKey:
        return WeightKey(name, Position(self._run, round_index, -1, client))

    def options(self, name: str) -> StoreOptions:
        return StoreOptions(self._address, self._folder / name, 120.0, 120.0, say)


def take(store: WeightStore, key: WeightKey, spec: StateSpec) -> Conversation[State]:
    """Take a front and decode it, as a server does."""
    data = yield from store.get(key)
    return decode_state(data, spec, "a front")


def time_rounds(timing: Timing, num_clients: int) -> list[float]:
    """Return the seconds that each round's exchange of weights took."""
    with (
        listen("127.0.0.1", 0) as listener,
        TcpServer(listener, Terms(120, timing.limits)) as network,
    ):
        port = int(listener.address.rpartition(":")[2])
        threads = [
            threading.Thread(target=client, args=(k, port, timing), daemon=True)
            for k in range(num_clients)
        ]
        for thread in threads:
            thread.start()
        links = gather(network, num_clients)
        options = timing.options("server")
        make = store_maker(options.open_place(), options, network.wake)
        stores = {k: make(link, timing.most_bytes) for k, link in sorted(links.items())}
        seconds = []
        for r in range(timing.rounds):
            started = time.perf_counter()
            keys = {k: timing.key(client_weights(k), k, r) for k in stores}
            taking = {k: partial(take, s, keys[k], timing.spec) for k, s in stores.items()}
            fronts = run_together(network, taking)
            data = encode_state(fed_avg(list(fronts.values()), [1] * len(fronts)))
            keys = {k: timing.key(AVERAGE, k, r) for k in stores}
            giving = {k: partial(s.put, keys[k], data) for k, s in stores.items()}
            run_together(network, giving)
            timing.everyone_has_it.wait()
            seconds.append(time.perf_counter() - started)
        for thread in threads:
            thread.join()
    return seconds


def gather(network: TcpServer, num_clients: int) -> dict[int, Link]:
    """Return the clients' links when all are there."""
    links: dict[int, Link] = {}
    while len(links) < num_clients:
        for link in network.wait_until(network.ready_members, 1.0):
            if not link.peer_name:
                k = link.receive_message_as_json(MessageType.REGISTER).content
                link.peer_name, links[k] = f"client_{k}", link
    return links
