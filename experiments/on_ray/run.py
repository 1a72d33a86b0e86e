"""A run on a Ray cluster, from its placement to its end.

::

    program                        server's actor              actors of clients
    reserve CPUs, GPUs
    call serve_here  ------------> serve(run, node) <========> host(node)      SFL's transport
    call host_here   ------------------------------------------^
    print its lines  <------------ what it prints
    wait for all     <------------ done, or an error <---------
"""

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from experiments.on_ray.placement import Needs, Resources, machines_of, placed
from experiments.on_ray.processes import Launch, Process, host_here, serve_here
from experiments.support.processes import free_port
from experiments.support.ray_cluster import Lines
from sfl.archive.checkpoint import checkpoint_paths
from sfl.archive.run_folder import new_run_name
from sfl.config import RunConfig
from sfl.errors import RunError, SflError, reason_of
from sfl.nodes import ClientNode, PeerNode, ServerNode
from sfl.runtime.on_end import running_at_end
from sfl.transport.addresses import format_address
from sfl.weights.stores import SOCKET

MOST_RESTARTS = 100  # of one process; more often, it dies of something that a restart does not mend
SERVER = "server"
POLL_S = 0.2  # how often the server's lines are looked for
SERVERS_REASON_S = 3.0  # to wait for the server's reason when clients have failed


def run_on_cluster(run: RunConfig, node: ServerNode, needs: Needs, argv: Sequence[str]) -> None:
    """Run server and clients as actors of the cluster that this process is part of.

    Raises:
        ConfigError: the cluster is too small, or the run cannot be run.
        RunError: an actor has failed.
    """
    run, node = _resolved(run, node)
    needs = needs.fitted(ray.available_resources())
    folder = Path(node.resume) if node.resume else node.out_path / "server" / run.run
    with running_at_end(node.on_end, folder), placed(needs) as group, _hint(folder):
        actors = _Actors(group, needs, Launch(secrets.token_hex(), argv, Lines()))
        with contextlib.closing(actors):
            actors.start(run, dataclasses.replace(node, on_end=""))
            actors.follow(goes_on_without=node.on_missing == "skip")
    print(f"the run's folder is on {socket.gethostname()}, {node.host}: {folder}", flush=True)


def _resolved(run: RunConfig, node: ServerNode) -> tuple[RunConfig, ServerNode]:
    """Return the options as actors need them, which work in other folders and start again."""
    paths = {"out": str(node.out_path.resolve()), "data_dir": str(node.data_path.resolve())}
    if node.resume:
        paths["resume"] = str(Path(node.resume).resolve())
    host = ray.util.get_node_ip_address()
    own = {"host": host, "port": node.port or free_port(host), "token_file": ""}
    name = run.run or new_run_name()
    return dataclasses.replace(run, run=name), dataclasses.replace(node, **paths, **own)


@contextlib.contextmanager
def _hint(folder: Path) -> Iterator[None]:
    """Say at a failure how to go on, if something is there to go on from."""
    try:
        yield
    except BaseException:
        if checkpoint_paths(folder):
            print(f"go on with: the same command, and --resume {folder}", flush=True)
        raise


def client_node(run: RunConfig, node: ServerNode, ids: range) -> ClientNode:
    """Return the options of the clients of one actor: the server's, as far as they have them."""
    common = {spec.name: getattr(node, spec.name) for spec in dataclasses.fields(PeerNode)}
    return ClientNode(
        **common | {"link": ""},  # which is of the server's machine
        server=f"{node.transport}://{format_address(node.host, node.port)}",
        client_ids=f"{ids[0]}-{ids[-1]}" if len(ids) > 1 else str(ids[0]),
        allow_weights="" if run.weights == SOCKET else run.weights,
    )


@dataclass
class _Actors:
    """The actors of a run; ``close`` ends them."""

    group: PlacementGroup
    needs: Needs
    launch: Launch
    _actors: list[Any] = field(default_factory=list)
    _calls: dict[Any, str] = field(default_factory=dict)  # what each has been called to be

    def start(self, run: RunConfig, node: ServerNode) -> None:
        """Start the server and the clients, and say where they are."""
        hosts = [client_node(run, node, ids) for ids in self.needs.groups]
        names = [SERVER, *(f"clients {host.client_ids}" for host in hosts)]
        for address, there in machines_of(self.group, names).items():
            print(f"on {address}: {', '.join(there)}", flush=True)
        self._call(SERVER, self.needs.server, serve_here, (run, node))
        for name, host in zip(names[1:], hosts, strict=True):
            self._call(name, self.needs.actor, host_here, (host,))

    def _call(
        self,
        name: str,
        reserved: Resources,
        function: Callable[..., None],
        arguments: Sequence[Any],
    ) -> None:
        """Start an actor at the next place, and call a function in it."""
        restarts = {"max_restarts": MOST_RESTARTS, "max_task_retries": MOST_RESTARTS}
        place = PlacementGroupSchedulingStrategy(self.group, len(self._actors))
        actor_class = ray.remote(Process).options(
            num_cpus=reserved["CPU"],
            num_gpus=reserved["GPU"],
            scheduling_strategy=place,
            **restarts,
        )
        actor = actor_class.remote()
        self._actors.append(actor)
        self._calls[actor.call.remote(name, self.launch, function, *arguments)] = name

    def follow(self, *, goes_on_without: bool) -> None:
        """Print what the server says, until all have ended.

        ``goes_on_without``: whether the run outlasts clients that have failed.

        Raises:
            SflError: the server has failed, or else clients have.
        """
        waiting = list(self._calls)
        server = waiting[0]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_S)
            self._print()
            for call in done:
                error = self._error_of(call)
                if error is None:
                    continue
                if goes_on_without and call != server:
                    print(error, flush=True)
                    continue
                raise self._servers_error(server) or error

    def _servers_error(self, server: Any) -> SflError | None:
        """Return the error of the server, which knows more, if it ends soon."""
        ended, _ = ray.wait([server], timeout=SERVERS_REASON_S)
        self._print()
        return self._error_of(server) if ended else None

    def _error_of(self, call: Any) -> SflError | None:
        name = self._calls[call]
        try:
            error: SflError | None = ray.get(call)
        except RayError as error_of_ray:
            return RunError(f"{name}: {reason_of(error_of_ray)}")
        if error is None or name == SERVER:
            return error
        return type(error)(f"{name}: {error}")

    def _print(self) -> None:
        for line in self.launch.lines.get():
            print(line, flush=True)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
