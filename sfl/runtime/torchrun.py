"""A server in the processes that ``torchrun`` has started; each serves a block of the clients.

The ranks talk over torch.distributed (gloo): JSON and float64 tensors, nothing pickled. What they
do together runs on a thread, while the rank's network lets in clients that come back; so it may
take for as long as another rank waits for its own. The clients' conversations are those of any
server.
"""

import dataclasses
import datetime
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sfl import __version__
from sfl.archive.layout import share_path
from sfl.archive.run_folder import EventLog
from sfl.config import RunConfig, flag
from sfl.errors import ConfigError, RunError, command
from sfl.nodes import ServerNode
from sfl.runtime.preflight import check_run
from sfl.runtime.rank_store import JOIN_WITHIN_S, Store, leave, meet, note_own_folders, owns_folders
from sfl.runtime.resume import has_begun
from sfl.runtime.server import serve
from sfl.runtime.waiting_notice import WaitingNotice
from sfl.strategy.merge import averages_backs
from sfl.strategy.ranks import Add, Ranks, as_it_is, block
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange, Fronts
from sfl.weights.stores import SOCKET
from sfl.wire.blocking_calls import Calls
from sfl.wire.driver import Gate, Network

T = TypeVar("T")
FOR_EVER = datetime.timedelta(days=365)  # torchrun ends a rank whose peers have ended


def serve_rank(run: RunConfig, node: ServerNode) -> None:
    """Serve this rank's share of the clients.

    Raises:
        ConfigError: the run cannot be one of several ranks.
        SflError: as ``serve``; ``RunError`` as well if another rank has ended.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_shared(check_run(run, imports_data=not node.resume), node, size)
    group = GlooGroup(rank, size)
    check_same_options(group.gather([__version__, dataclasses.asdict(run)]))
    serve(run, node_of(node, run, group), group)


def node_of(node: ServerNode, run: RunConfig, group: "GlooGroup") -> ServerNode:
    """Return a rank's own options; one that torchrun has started again resumes its share."""
    rank = group.rank
    folder = Path(node.resume) if node.resume else node.out_path / "server" / run.run
    own = share_path(folder, rank)
    is_of_earlier_attempt = group.owns_folders(has_begun(own))
    goes_on = bool(node.resume) or (is_of_earlier_attempt and has_begun(own))
    port = node.port and node.port + int(os.environ["LOCAL_RANK"])
    node = dataclasses.replace(node, port=port, resume=str(own) if goes_on else "")
    return node if rank == 0 else dataclasses.replace(node, track="", on_end="")


def check_shared(recipe: Recipe, node: ServerNode, size: int) -> None:
    """Check that a run's clients can be shared among so many ranks.

    Raises:
        ConfigError: they cannot.
    """
    run, row = recipe.run, recipe.scheme
    for option, holds, why in (
        ("run", run.run, "give the run a name, which all processes and restarts know it by"),
        ("clients", size <= run.clients, f"{size} processes need a client each"),
        ("max_clients", run.most_clients == run.clients, "each process serves a fixed block"),
        ("scheme", row.exchange is not Exchange.WEIGHT_GRADS, "each update needs all clients"),
        ("scheme", row.fronts is not Fronts.RELAYED, "its clients train one after the other"),
        (
            "scheme",
            row.exchange is not Exchange.CUT or averages_backs(recipe) or recipe.joins,
            "its clients share one copy of the server's part of the model",
        ),
        ("topology", not recipe.joins, "all clients take part in each step"),
        ("topology", not recipe.has_followers, "hops and the servers of tasks follow one process"),
        ("aggregation", run.aggregation == "fedavg", "it needs all models in one process"),
        ("weights", run.weights == SOCKET, "each process sends its clients their weights"),
        ("role", node.role == "all", "the fed server averages in one process"),
        ("on_missing", node.on_missing == "wait", "all processes wait for their clients"),
        ("transport", node.transport in ("tcp", "ws"), "clients are sent on by HOST:PORT"),
        ("serve", not node.serve, "a finished model is served by one process"),
    ):
        if not holds:
            given = getattr(run if hasattr(run, option) else node, option)
            raise ConfigError(
                f"{flag(option)} {given}".rstrip() + f": cannot be shared by {size} processes of"
                f" torchrun: {why}; or start {command('server')} without torchrun"
            )


def check_same_options(known: Sequence[Any]) -> None:
    """Check that all ranks run the same release with the same options.

    Raises:
        ConfigError: they do not.
    """
    (version, options), *others = known
    for rank, (theirs, theirs_options) in enumerate(others, start=1):
        if theirs != version:
            raise ConfigError(f"rank {rank} runs SFL {theirs}, rank 0 {version}: have one release")
        for name, value in options.items():
            if theirs_options[name] != value:
                raise ConfigError(
                    f"{flag(name)} {theirs_options[name]}: of rank {rank}; rank 0 has {value}: give"
                    " all processes the same options"
                )


class GlooGroup:
    """The ranks that torchrun has started, before there is a network."""

    def __init__(self, rank: int, size: int) -> None:
        """Join the others."""
        self.rank, self.size = rank, size
        self.command = f"torchrun (its options as before) -- {command('server')}"
        self._has_returned = threading.Event()
        self._store, self._attempt = self._run(lambda: _join(rank, size))

    def owns_folders(self, has_begun: bool) -> bool:
        """Return whether the folders of the run are of an earlier attempt of this torchrun.

        ``has_begun``: whether this rank's share of the run has.
        """
        known = self.gather([owns_folders(self._store), has_begun])
        if self.rank == 0 and not any(begun for _, begun in known):
            note_own_folders(self._store)
        return any(is_noted for is_noted, _ in known)

    def _run(self, call: Callable[[], T]) -> T:
        """Make a blocking call that Ctrl-C can interrupt."""
        self._has_returned.clear()
        return result_of(Calls(self._has_returned.set), call, lambda g: self._has_returned.wait())

    def gather(self, value: Any) -> list[Any]:
        return self._run(lambda: _all_gather(value, self.size))

    def ranks(self, network: Network, events: EventLog) -> Ranks:
        return GlooRanks(self.rank, self.size, network, WaitingNotice(events), self._attempt)


class GlooRanks:
    """``Ranks`` over gloo."""

    def __init__(
        self, rank: int, size: int, network: Network, notice: WaitingNotice, attempt: Store
    ) -> None:
        self._rank, self._size, self._network = rank, size, network
        self._notice, self._attempt = notice, attempt
        self._calls = Calls(network.wake)

    def _run(self, call: Callable[[], T]) -> T:
        with self._notice:
            return result_of(self._calls, call, self._wait)

    def _wait(self, gate: Gate) -> None:
        self._network.wait((), (gate,))
        if not gate():
            self._notice.update("waiting for the server's other processes")

    def ours(self, clients: Sequence[int]) -> list[int]:
        return block(clients, self._rank, self._size)

    def gather(
        self,
        own: Mapping[int, T],
        pack: Callable[[T], Any] = as_it_is,
        unpack: Callable[[Any], T] = as_it_is,
    ) -> dict[int, T]:
        packed = {k: pack(value) for k, value in own.items()}
        of_ranks = self._run(lambda: _all_gather(packed, self._size))
        found = {int(k): unpack(value) for of_rank in of_ranks for k, value in of_rank.items()}
        return dict(sorted(found.items()))

    def pass_on(self, add: Add, sums: Tensor) -> None:
        before, after, last = self._rank - 1, self._rank + 1, self._size - 1
        if before >= 0:
            self._run(lambda: dist.recv(sums, before))
        add(sums)
        if after <= last:
            self._run(lambda: dist.send(sums, after))
        self._run(lambda: dist.broadcast(sums, last))

    def leave(self) -> None:
        leave(self._attempt, self._rank, self._size)

    def record(self) -> dict[str, Any]:
        return {"ranks": {"rank": self._rank, "size": self._size}}


def result_of(calls: Calls, call: Callable[[], T], wait: Callable[[Gate], object]) -> T:
    """Make a blocking call on a thread; ``wait`` does other work meanwhile.

    Raises:
        RunError: another rank has ended.
    """
    talk = calls.run(call)
    try:
        while True:
            gate = next(talk)
            while not gate():  # type: ignore[operator]
                wait(gate)  # type: ignore[arg-type]
    except StopIteration as end:
        result: T = end.value
        return result
    except RuntimeError as error:  # of torch.distributed
        raise RunError("another process of the server has ended: see its log") from error


def _join(rank: int, size: int) -> tuple[Store, Store]:
    """Set up torch.distributed; return torchrun's store, and the part of it for this attempt."""
    within = datetime.timedelta(seconds=JOIN_WITHIN_S)
    try:
        store = next(rendezvous("env://", rank, size, timeout=within))[0]
        own = dist.PrefixStore(meet(store, rank, size), store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=FOR_EVER)
    except RuntimeError as error:  # of torch.distributed
        why = str(error).partition("\n")[0]
        raise RunError(f"rank {rank} cannot reach the server's other processes: {why}") from error
    return store, own


def _all_gather(value: Any, size: int) -> list[Any]:
    """Return the values of all ranks."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)]))
    most = max(int(length) for length in lengths)
    padded = torch.cat([data, torch.zeros(most - len(data), dtype=torch.uint8)])
    found = [torch.zeros(most, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(found, padded)
    ends = zip(found, lengths, strict=True)
    return [json.loads(bytes(one[: int(length)].numpy())) for one, length in ends]
