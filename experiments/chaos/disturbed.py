"""Running a configuration while its processes are killed and its connections break."""

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.chaos.small_model import CUT, NAME
from experiments.support.processes import ROOT, free_port, last_line, running
from experiments.support.slow_link import SlowLink
from sfl.errors import RunError
from sfl.runtime.follower_kinds import kind_of
from sfl.values import UNCUT

# Small, with BatchNorm, dropout and Adam; what the caller gives comes later and wins.
DEFAULTS = ["--model", NAME, "--cut", str(CUT), "--batch-size", "20", "--run", "r"]
CLIENT_OPTIONS = ["--allow-import", NAME]
SERVER = "server"
PATIENCE_S = 300.0  # for a run that makes no progress


@dataclass
class Trouble:
    """What is to be done to a run, and how much of it has been."""

    kills: int
    stops: int
    cuts: int
    flips: int
    blackouts: int
    blackout_s: float
    delay_s: float
    cut_bytes: float
    round_s: float
    done: Counter[str] = field(default_factory=Counter)

    @property
    def wanted(self) -> dict[str, int]:
        return {
            "kill": self.kills,
            "stop": self.stops,
            "cut": self.cuts,
            "flip": self.flips,
            "blackout": self.blackouts,
        }

    def kinds_left(self) -> list[str]:
        return [kind for kind, count in self.wanted.items() if self.done[kind] < count]

    @property
    def is_left(self) -> bool:
        return bool(self.kinds_left())

    @property
    def left(self) -> str:
        counts = (f"{self.wanted[k] - self.done[k]} {k}s" for k in self.kinds_left())
        return f"{', '.join(counts) or 'nothing'} to go"


class Parties:
    """Who takes part: the server, clients, and the followers of the server, which have a port."""

    def __init__(self, num_clients: int, followers: Sequence[str] = ()) -> None:
        """``followers``: their roles, as ``Recipe.followers`` has them."""
        self.num_clients = num_clients
        beside = [role for role in followers if kind_of(role).only_asks]
        chain = [*(role for role in followers if role not in beside), SERVER]
        self._next = dict(itertools.pairwise(chain)) | dict.fromkeys(beside, SERVER)
        self._tasks = {role.partition(":")[2]: role for role in beside}
        self.entrances = [chain[0], *beside]  # where clients connect

    @property
    def followers(self) -> list[str]:
        """Their roles; who is further on comes first."""
        return [*reversed(self._next)]

    @property
    def names(self) -> list[str]:
        return [SERVER, *self.followers, *(f"client_{k}" for k in range(self.num_clients))]

    def ports(self) -> dict[str, int]:
        """Return a free port for the server and each follower."""
        return {role: free_port() for role in (SERVER, *self.followers)}

    def server_options(self, addresses: Mapping[str, str]) -> list[str]:
        """Return how many clients there are, and where they reach the servers of further tasks."""
        where = ",".join(f"{name}={addresses[role]}" for name, role in self._tasks.items())
        told = ["--task-servers", where] if where else []
        return ["--clients", str(self.num_clients), *told]

    def follower_command(self, role: str, ports: Mapping[str, int]) -> list[str]:
        to = f"127.0.0.1:{ports[self._next[role]]}"
        listens = ["--role", role, "--port", str(ports[role]), "--next", to]
        return ["run_server.py", *listens, *CLIENT_OPTIONS]


def undisturbed(out: Path, options: Sequence[str], parties: Parties) -> tuple[Path, float, float]:
    """Run a configuration; return its folder, and a round's seconds and bytes for each client."""
    common, num_clients, ports = ["--out", str(out)], parties.num_clients, parties.ports()
    addresses = {role: f"127.0.0.1:{port}" for role, port in ports.items()}
    with running([*DEFAULTS, *parties.server_options(addresses), *options, *common]) as processes:
        addresses[SERVER] = processes.address
        ports[SERVER] = int(processes.address.rpartition(":")[2])
        followers = [
            processes.start(role, [*parties.follower_command(role, ports), *common])
            for role in parties.followers
        ]
        entrance = addresses[parties.entrances[0]]
        processes.start_clients([entrance] * num_clients, [*CLIENT_OPTIONS, *common])
        for _ in processes.lines():
            pass
        processes.wait()
        for follower in followers:
            follower.wait()
        folder = out / "server" / processes.run
    with open(folder / "rounds.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    seconds = sorted(float(row["seconds"]) for row in rows)[len(rows) // 2]
    num_bytes = int(rows[-1]["bytes_up"]) + int(rows[-1]["bytes_down"])
    return folder, seconds, num_bytes / num_clients


class Disturbance:
    """One run of all parties, and what happens to it."""

    def __init__(
        self,
        out: Path,
        options: Sequence[str],
        parties: Parties,
        trouble: Trouble,
        draws: random.Random,
    ) -> None:
        self._out, self._options, self._trouble, self._draws = out, options, trouble, draws
        self._parties, self._names = parties, parties.names
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._restart_at: dict[str, float] = {}
        self._began_at = time.monotonic()
        self._folder = out / "server" / "r"
        self._ports = parties.ports()
        self._links = {
            role: SlowLink(
                "127.0.0.1",
                self._ports[role],
                delay_s=trouble.delay_s,
                cut_after=lambda: self._after("cut", self._trouble.cuts),
                flip_after=lambda: self._after("flip", self._trouble.flips),
            )
            for role in parties.entrances
        }
        self._addresses = {role: link.address for role, link in self._links.items()}

    def _after(self, kind: str, wanted: int) -> float:
        """Return after how many bytes one direction of a new connection breaks, or a bit flips."""
        if self._trouble.done[kind] >= wanted:
            return UNCUT
        return self._draws.uniform(0, 2 * self._trouble.cut_bytes)

    def run(self) -> Path:
        """Run until the server has done all rounds, and return its folder.

        Raises:
            RunError: a process ended by itself as it should not, or nothing goes on.
        """
        self._out.mkdir(parents=True)
        try:
            for name in self._names:
                self._start(name)
            next_at, before = time.monotonic() + self._draws.uniform(0, 4), (0, 0)
            while not self._has_ended():
                time.sleep(0.02)
                self._restart()
                counts = [(link.num_cut, link.num_flipped) for link in self._links.values()]
                now = sum(cut for cut, _ in counts), sum(flipped for _, flipped in counts)
                for kind, old, new in zip(("cut", "flip"), before, now, strict=True):
                    self._trouble.done[kind] += new - old
                before = now
                kinds = [k for k in self._trouble.kinds_left() if k not in ("cut", "flip")]
                if kinds and time.monotonic() >= next_at and not self._restart_at:
                    kind = self._draws.choice(kinds)
                    self._disturb(kind)
                    next_at = time.monotonic() + self._pause_s()
                    next_at += self._trouble.blackout_s if kind == "blackout" else 0
            for name in self._names[1:]:
                self._end_other(name)
            return self._folder
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()
            for link in self._links.values():
                link.close()

    def _pause_s(self) -> float:
        """Return when to strike again: now and then while processes start, else in a later round.

        A process takes some seconds to be there again.
        """
        soon = self._draws.random() < 0.25
        return (
            self._draws.uniform(0, 3)
            if soon
            else 4 + self._draws.uniform(0, 2 * self._trouble.round_s)
        )

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_at:7.1f} s  {text}", flush=True)

    def _start(self, name: str) -> None:
        common = ["--out", str(self._out)]
        if name in self._parties.followers:
            command = [*self._parties.follower_command(name, self._ports), *common]
        elif name != SERVER:
            client = name.removeprefix("client_")
            address = self._addresses[self._parties.entrances[0]]
            command = ["run_client.py", "--server", address, "--client-id", client]
            command += [*CLIENT_OPTIONS, *common]
        else:
            command = ["run_server.py", "--port", str(self._ports[SERVER])]
            command += self._server_options()
        with (
            open(self._out / f"{name}.out", "ab") as output,
            open(self._out / f"{name}.err", "ab") as errors,
        ):
            self._processes[name] = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=output, stderr=errors
            )

    def _server_options(self) -> list[str]:
        if (self._folder / "config.json").exists():
            return ["--resume", str(self._folder)]
        own = self._parties.server_options(self._addresses)
        return [*DEFAULTS, *own, *self._options, "--out", str(self._out)]

    def _has_ended(self) -> bool:
        """Say whether the server has done all; notice what has ended by itself.

        Raises:
            RunError: a process failed, or there was no output for long.
        """
        for name, process in self._processes.items():
            code = process.poll()
            if code is None or name in self._restart_at:
                continue
            why = last_line(self._out / f"{name}.err")
            if name == SERVER and (code == 0 or "has done its" in why):
                return True
            if code != 0:
                raise RunError(f"{name} ended by itself: {why}")
        newest = max(path.stat().st_mtime for path in self._out.glob("*.out"))
        if time.time() - newest > PATIENCE_S:
            raise RunError(f"no line of output for {PATIENCE_S:g} seconds; see {self._out}")
        return False

    def _restart(self) -> None:
        for name, due_at in list(self._restart_at.items()):
            if time.monotonic() >= due_at:
                del self._restart_at[name]
                self._say(f"start    {name}")
                self._start(name)

    def _disturb(self, kind: str) -> None:
        if kind == "blackout":
            self._say(f"blackout for {self._trouble.blackout_s:g} s")
            for link in self._links.values():
                link.go_dark(self._trouble.blackout_s)
            self._trouble.done["blackout"] += 1
            return
        if kind == "stop":
            self._stop(self._draws.choice(self._names))
            return
        chance = self._draws.random()
        victims = [SERVER] if chance < 0.35 else [self._draws.choice(self._names[1:])]
        if chance > 0.8:
            victims = self._draws.sample(self._names, self._draws.randint(2, len(self._names)))
        for name in victims[: self._trouble.kills - self._trouble.done["kill"]]:
            if self._processes[name].poll() is None:
                self._say(f"SIGKILL  {name}")
                self._processes[name].kill()
                self._processes[name].wait()
                self._trouble.done["kill"] += 1
                self._restart_at[name] = time.monotonic() + self._draws.uniform(0, 1)

    def _stop(self, name: str) -> None:
        process, seconds = self._processes[name], self._draws.uniform(0.2, 3)
        if process.poll() is None:
            self._say(f"SIGSTOP  {name} for {seconds:.1f} s")
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(process.pid, signal.SIGCONT)
            self._trouble.done["stop"] += 1

    def _end_other(self, name: str) -> None:
        """Wait for a party of a run that is over; one that has just been started finds nobody.

        Raises:
            RunError: it failed.
        """
        try:
            if self._processes[name].wait(20) > 0:
                why = last_line(self._out / f"{name}.err")
                raise RunError(f"{name} ended by itself: {why}")
        except subprocess.TimeoutExpired:
            self._say(f"{name} came too late to hear that the run is over")
