"""Run server and clients as actors that Ray places over a cluster, and starts again if they die.

python -m experiments.on_ray --address auto --clients 8 [run options]
python -m experiments.on_ray --address local --virtual-clients 1000 --participation 0.05

An actor is a process with SFL's server or with one or more clients; they talk over SFL's transport.
All other options are the server's (docs/transports.md).
"""

import os
import sys
from argparse import Namespace

from experiments.support import quiet_ray
from sfl.config import RunConfig, flag
from sfl.errors import ConfigError
from sfl.nodes import ServerNode
from sfl.options import Parser, parse_options
from sfl.program import run_program

PROG = "python -m experiments.on_ray"
# Options of a server that have no place here, and why.
NOT_HERE = {
    "serve": "is for run_server.py",
    "role": "both roles are one actor's here",
    "fed_server": "both roles are one actor's here",
    "tls_cert": "actors have no certificates; the token of the run protects the start of a"
    " connection, and what follows is as safe as the cluster's network",
}
# Those that this program gives itself.
OURS = {
    "host": "the server listens on the address that its machine has in the cluster",
    "token_file": "each run makes a token of its own",
}


def parse() -> tuple[Namespace, list[str]]:
    """Return this program's options, and those of run and server."""
    parser = Parser(
        prog=PROG,
        description="Run server and clients as actors that Ray places over a cluster by the CPUs"
        " and GPUs that they reserve, and starts again if they die.",
        epilog="All other options are the server's: see run_server.py --help.",
    )
    parser.add_argument(
        "--address", default="local", metavar="ADDRESS",
        help="local: a cluster of this machine alone, for the time of the run (the default); auto:"
        " the cluster that this machine is part of; or HOST:PORT of its head",
    )  # fmt: skip
    parser.add_argument(
        "--virtual-clients", type=int, default=0, metavar="N",
        help="in place of --clients: so many clients, as few or many of them in an actor as the"
        " free CPUs ask for",
    )  # fmt: skip
    parser.add_argument(
        "--clients-per-actor", type=int, default=0, metavar="N",
        help="clients of each actor (default: 1, with --virtual-clients what fits)",
    )  # fmt: skip
    for whom, which in (("server", "the server's actor"), ("actor", "each actor of clients")):
        parser.add_argument(
            f"--cpus-per-{whom}", type=float, default=1.0, metavar="X",
            help=f"CPUs that {which} reserves, also parts of one (default: 1)",
        )  # fmt: skip
        parser.add_argument(
            f"--gpus-per-{whom}", type=float, default=0.0, metavar="X",
            help=f"GPUs that {which} reserves; without, it sees none (default: 0)",
        )  # fmt: skip
    return parser.parse_known_args()


def check(own: Namespace, node: ServerNode) -> None:
    """See that the options make sense here.

    Raises:
        ConfigError: they do not.
    """
    for name in ("cpus_per_server", "cpus_per_actor"):
        if not 0.001 <= getattr(own, name) < 1e6:
            raise ConfigError(f"{flag(name)} {getattr(own, name):g}: must be at least 0.001")
    for name in ("gpus_per_server", "gpus_per_actor", "virtual_clients", "clients_per_actor"):
        if not 0 <= getattr(own, name) < 1e6:
            raise ConfigError(f"{flag(name)} {getattr(own, name):g}: must be 0 or more")
    if node.transport not in ("tcp", "ws"):
        raise ConfigError(f"--transport {node.transport}: actors talk over tcp or ws")
    # A run that goes on has in its record what this program gave it.
    for name, why in (NOT_HERE if node.resume else NOT_HERE | OURS).items():
        if getattr(node, name) != getattr(ServerNode, name):
            raise ConfigError(f"{flag(name)} {getattr(node, name)}: leave it out: {why}")


def main() -> None:
    own, rest = parse()
    virtual = [f"--clients={own.virtual_clients}"] if own.virtual_clients else []
    run, node = parse_options([*rest, *virtual], RunConfig, ServerNode, prog=PROG, about="")
    check(own, node)
    os.environ.update(quiet_ray.ENVIRONMENT)
    from experiments.on_ray.placement import Needs
    from experiments.on_ray.run import run_on_cluster
    from experiments.support.ray_cluster import connected
    from sfl.runtime.preflight import check_run

    if check_run(run).has_followers:
        raise ConfigError(
            f"--topology {run.topology}: its further parties are started by hand, not as actors"
        )
    needs = Needs(
        server={"CPU": own.cpus_per_server, "GPU": own.gpus_per_server},
        actor={"CPU": own.cpus_per_actor, "GPU": own.gpus_per_actor},
        num_clients=run.clients,
        per_actor=own.clients_per_actor or (0 if own.virtual_clients else 1),
    )
    with connected(own.address):
        run_on_cluster(run, node, needs, sys.argv)


if __name__ == "__main__":
    sys.exit(run_program("on_ray", main))
