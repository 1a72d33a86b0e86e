"""Running a configuration while its processes are killed and its connections break."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.chaos.small_model import CUT, NAME
from experiments.support.processes import ROOT, free_port, last_line, running
from experiments.support.slow_link import SlowLink
from sfl.errors import RunError
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


@dataclass(frozen=True)
class Parties:
    """Who takes part beside the server."""

    num_clients: int
    num_hops: int = 0

    @property
    def names(self) -> list[str]:
        hops = (f"hop_{place}" for place in range(self.num_hops, 0, -1))
        return [SERVER, *hops, *(f"client_{k}" for k in range(self.num_clients))]

    def ports(self, server_port: int) -> list[int]:
        """Return free ports of the hops, from the first on, and the server's behind them."""
        return [*(free_port() for _ in range(self.num_hops)), server_port]


def hop_command(place: int, ports: Sequence[int]) -> list[str]:
    """Return the command of a hop, which listens at ``ports[place - 1]``."""
    to = f"127.0.0.1:{ports[place]}"
    listens = ["--role", f"hop:{place}", "--port", str(ports[place - 1]), "--next", to]
    return ["run_server.py", *listens, *CLIENT_OPTIONS]


def undisturbed(out: Path, options: Sequence[str], parties: Parties) -> tuple[Path, float, float]:
    """Run a configuration; return its folder, and a round's seconds and bytes for each client."""
    common, num_clients = ["--out", str(out)], parties.num_clients
    server = [*DEFAULTS, "--clients", str(num_clients), *options, *common]
    with running(server) as processes:
        address = processes.address
        for place in range(parties.num_hops, 0, -1):
            address = processes.start_hop(place, address, [*CLIENT_OPTIONS, *common])
        processes.start_clients([address] * num_clients, [*CLIENT_OPTIONS, *common])
        for _ in processes.lines():
            pass
        processes.wait()
        folder = out / "server" / processes.run
    with open(folder / "rounds.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    seconds = sorted(float(row["seconds"]) for row in rows)[len(rows) // 2]
    num_bytes = int(rows[-1]["bytes_up"]) + int(rows[-1]["bytes_down"])
    return folder, seconds, num_bytes / num_clients


class Disturbance:
    """One run of server and clients, and what happens to it."""

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
        self._port = free_port()
        self._ports = parties.ports(self._port)
        self._link = SlowLink(
            "127.0.0.1",
            self._ports[0],
            delay_s=trouble.delay_s,
            cut_after=lambda: self._after("cut", self._trouble.cuts),
            flip_after=lambda: self._after("flip", self._trouble.flips),
        )

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
                now = self._link.num_cut, self._link.num_flipped
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
                self._end_client(name)
            return self._folder
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()
            self._link.close()

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
        if name.startswith("hop_"):
            command = [*hop_command(int(name.removeprefix("hop_")), self._ports), *common]
        elif name != SERVER:
            client = name.removeprefix("client_")
            command = ["run_client.py", "--server", self._link.address, "--client-id", client]
            command += [*CLIENT_OPTIONS, *common]
        elif (self._folder / "config.json").exists():
            command = ["run_server.py", "--port", str(self._port), "--resume", str(self._folder)]
        else:
            clients = str(self._parties.num_clients)
            command = ["run_server.py", "--port", str(self._port), *DEFAULTS]
            command += ["--clients", clients, *self._options, *common]
        with (
            open(self._out / f"{name}.out", "ab") as output,
            open(self._out / f"{name}.err", "ab") as errors,
        ):
            self._processes[name] = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=output, stderr=errors
            )

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
            self._link.go_dark(self._trouble.blackout_s)
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

    def _end_client(self, name: str) -> None:
        """Wait for a client of a run that is over; one that has just been started finds nobody.

        Raises:
            RunError: it failed.
        """
        try:
            if self._processes[name].wait(20) > 0:
                why = last_line(self._out / f"{name}.err")
                raise RunError(f"{name} ended by itself: {why}")
        except subprocess.TimeoutExpired:
            self._say(f"{name} came too late to hear that the run is over")
