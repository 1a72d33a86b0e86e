"""Configurations that several tests run, and starting them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.support.launch import Launcher, Program, free_port, wait_for

BN_DROPOUT = "tests.support.models:bn_dropout"
RUN: dict[str, object] = {
    "model": BN_DROPOUT,
    "cut": 6,
    "batch_size": 200,
    "rounds": 3,
    "run": "r",
}
ALLOW = ["--allow-import", BN_DROPOUT]
STEPS = 6  # of each of three clients in a round
OWN_STATE = RUN | {"scheme": "sflv3", "optimizer_state": "keep", "clients": 2}
FAST = ["--model", "mlp", "--batch-size", 200]
LONG = [*FAST, "--rounds", 1000, "--keep-tensors", "none"]


def removed(path: Path) -> None:
    """Remove a file, or a folder into which a run writes meanwhile."""
    if path.is_file():
        path.unlink()
        return
    aside = path.with_name("removed")
    path.rename(aside)
    shutil.rmtree(aside)


def start_long_run(
    launcher: Launcher, clients: int = 2, *client_options: object
) -> tuple[Program, list[Program]]:
    """Start a run and wait until it is in its third round."""
    server = launcher.server("--clients", clients, *LONG)
    own = [launcher.client("--client-id", k, *client_options) for k in range(clients)]
    wait_for(server, "round 2/1000")
    return server, own


OWN = ["--clients", 2, "--partition", "own", "--model", "mlp", "--rounds", 2]


def go_on(
    launcher: Launcher, *options: object, clients: int = 3, allow: Sequence[str] = ALLOW
) -> Path:
    """Go on with the launcher's run to its end."""
    run = launcher.folder / "server" / "r"
    server = launcher.server("--resume", run, *options)
    own = [launcher.client("--client-id", k, *allow) for k in range(clients)]
    for program in [server, *own]:
        program.ended_with(0)
    return run


def start_all(
    launcher: Launcher, place: str, *options: object, apart: bool = False, clients: int = 3
) -> tuple[list[Program], list[Program]]:
    """Start servers and clients of a run; return both."""
    store = [] if place == "socket" else ["--weights", place]
    servers, role = [], []
    if apart and place == "socket":
        port = free_port()
        servers.append(launcher.fed("--port", port, *ALLOW))
        role = ["--role", "main", "--fed-server", f"127.0.0.1:{port}"]
    elif apart:
        servers.append(launcher.fed(*store, "--run", "r", *ALLOW))
        role = ["--role", "main"]
    servers.append(launcher.server("--clients", clients, "--run", "r", *store, *role, *options))
    allow = [] if place == "socket" else ["--allow-weights", place]
    own = [launcher.client("--client-id", k, *ALLOW, *allow) for k in range(clients)]
    return servers, own
