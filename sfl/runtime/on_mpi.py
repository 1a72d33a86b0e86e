"""Run the server or clients as one of the processes that ``mpirun`` has started."""

import dataclasses

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import ClientNode, PeerNode, ServerNode
from sfl.runtime.client import take_part
from sfl.runtime.hosting import host
from sfl.runtime.server import serve
from sfl.transport.mpi import SERVER, World, world


def take_rank(run: RunConfig, node: ServerNode) -> None:
    """Be the server as rank 0, or else as many clients as fall to this rank.

    Raises:
        ConfigError: there are more ranks than clients, or none for them.
        SflError: as ``serve`` and ``take_part``.
    """
    ours = world()
    num_hosts = ours.size - 1
    if not 1 <= num_hosts <= run.clients:
        raise ConfigError(
            f"mpirun has started {ours.size} processes, a server and {num_hosts} for clients;"
            f" --clients {run.clients} needs 1 to {run.clients} of these: give mpirun -n"
            f" {run.clients + 1}, or another --clients"
        )
    if ours.rank == SERVER:
        serve(run, dataclasses.replace(node, transport="mpi"))
    else:
        _take_part(ours, run, node)


def _take_part(ours: World, run: RunConfig, node: ServerNode) -> None:
    ids = range(ours.rank - 1, run.clients, ours.size - 1)
    common = {f.name: getattr(node, f.name) for f in dataclasses.fields(PeerNode)}
    common["device"] = node.devices[(ours.rank - 1) % len(node.devices)]
    own = {"client_ids": ",".join(map(str, ids))} if len(ids) > 1 else {"client_id": ids[0]}
    client = ClientNode(server="mpi://", **common, **own)
    (host if len(ids) > 1 else take_part)(client)
