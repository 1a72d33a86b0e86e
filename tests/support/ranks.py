"""Servers of several ranks, started as torchrun starts them or by it, and what they leave."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed import TCPStore

from sfl.crash import VARIABLE
from tests.support.launch import OFFLINE, Launcher, Program, free_port
from tests.support.programs import ROOT
from tests.support.weights import weights


def start_ranks(
    launcher: Launcher,
    size: int,
    *options: object,
    store: TCPStore | None = None,
    crash: Mapping[int, str] | None = None,
) -> list[Program]:
    """Start a server of so many ranks, each with the environment that torchrun gives it.

    ``store``: torchrun's, which outlives the ranks; else rank 0 makes one. ``crash``: points of
    ``SFL_CRASH_AT``, by rank.
    """
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": str(store is not None),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port if store else free_port()),
    }
    own = [
        # On machines of their own, ranks have been started again differently often.
        {"RANK": str(r), "LOCAL_RANK": str(r), "TORCHELASTIC_RESTART_COUNT": str(r)}
        | ({VARIABLE: crash[r]} if crash and r in crash else {})
        for r in range(size)
    ]
    return [launcher.server("--run", "r", *options, env=shared | of_rank) for of_rank in own]


def agent_store() -> TCPStore:
    """Return a store as torchrun has one."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def torchrun(launcher: Launcher, size: int, *options: object) -> "subprocess.Popen[str]":
    """Start a server of so many ranks under torchrun, which restarts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", size]
    command += ["--max-restarts", 2, "--", "run_server.py", "--port", launcher.port]
    command += ["--out", launcher.folder, "--run", "r", *options]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **OFFLINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_rank(started: "subprocess.Popen[str]", rank: int) -> None:
    """Kill one of the processes that torchrun has started, as SIGKILL does."""
    own = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    for pid in own:
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError(f"torchrun has no rank {rank}")


def weights_of_ranks(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every model file of all shares, which must agree where they meet."""
    found = weights(run)
    for share in sorted(run.glob("rank_*")):
        for name, tensor in weights(share).items():
            assert torch.equal(found.setdefault(name, tensor), tensor), (share, name)
    return found


def untimed_figures(run: Path) -> list[list[dict[str, str]]]:
    """Return the figures of a run's files, except for times."""
    tables = [run / "rounds.csv", *sorted((run / "rounds").iterdir())]
    return [_untimed(path) for path in tables]


def _untimed(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rows = [row for row in rows if not row.get("metric", "").endswith("_s")]
    return [{n: v for n, v in row.items() if not n.endswith(("_s", "seconds"))} for row in rows]
