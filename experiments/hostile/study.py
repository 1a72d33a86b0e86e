"""A run of honest clients, once alone and once attacked, and how the two differ."""

import csv
import resource
import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.hostile.attempts import Table, Watch, attack, print_table
from experiments.hostile.lone_servers import greedy, insider, uninvited
from experiments.hostile.target import target_of
from experiments.support.processes import running
from experiments.support.same_run import compare
from experiments.support.small_ca import SmallCA
from sfl.archive.run_folder import create_run_folder
from sfl.auth import main as auth

CALM_S = 10.0  # between attacks
RUN = ["--model", "lenet5", "--batch-size", "128", "--transport", "ws", "--run", "r"]
OVER_HOP = ["--topology", "multi-hop", "--cut", "3,9"]
OVER = ["", "wss://", "wss://"]  # how each client reaches the server or hop: TCP, or WebSocket
NUM_CLIENTS = len(OVER)


@dataclass
class Honest:
    """A run of honest clients, and when each of its rounds ended."""

    folder: Path
    ended_at: list[float] = field(default_factory=list)
    over: bool = False

    def seconds(self) -> list[float]:
        """Return what each round took, by its own clock."""
        with open(self.folder / "rounds.csv", newline="") as stream:
            return [float(row["seconds"]) for row in csv.DictReader(stream)]


@dataclass(frozen=True)
class Options:
    """The options of a run's parties, each with its secrets."""

    server: list[str]
    clients: list[list[str]]
    hop: list[str] = field(default_factory=list)  # before the server; empty: there is none


def honest_run(out: Path, options: Options, meanwhile: Callable[[str, Honest], None]) -> Honest:
    """Run honest parties to their end, and something else beside them.

    ``meanwhile`` is given the address that clients connect to, and the run.
    """
    common = ["--out", str(out)]
    with running([*options.server, *common]) as processes:
        address = processes.address
        if options.hop:
            address = processes.start_hop(1, address, [*options.hop, *common])
        addresses = [f"{scheme}{address}" for scheme in OVER]
        processes.start_clients(addresses, common, lambda k: options.clients[k])
        run = Honest(out / "server" / processes.run)
        beside = threading.Thread(target=meanwhile, args=(address, run))
        for line in processes.lines():
            if line.startswith("round "):
                run.ended_at.append(time.monotonic())
                if not beside.is_alive() and len(run.ended_at) == 1:
                    beside.start()
        run.over = True
        processes.wait()
        if run.ended_at:
            beside.join()
    return run


class Attacker:
    """Attacks an honest run in stretches, and leaves it alone between them."""

    def __init__(self, seconds: float, token_file: str) -> None:
        self.table: Table = {}
        self.stretches: list[tuple[float, float]] = []  # when each began and ended
        self.processor_s = 0.0  # used in the stretches
        self._seconds, self._token_file = seconds, token_file

    def attack(self, address: str, run: Honest) -> None:
        """Attack until the run is over or the time is up."""
        target = target_of(f"wss://{address}", self._token_file, tls=True)
        watch = Watch(target, run.folder)
        end = time.monotonic() + self._seconds
        while not run.over and time.monotonic() < end:
            began, used = time.monotonic(), _processor_s()
            attack(target, self.table, watch)
            self.stretches.append((began, time.monotonic()))
            self.processor_s += _processor_s() - used
            _wait(run, CALM_S)

    def processors(self) -> float:
        """Return how many processors it kept busy in the stretches."""
        return self.processor_s / sum(end - began for began, end in self.stretches)


def study(options: Namespace) -> int:
    """Attack runs that are started here; return how much was disturbed, or differs."""
    out = create_run_folder(Path(options.out).resolve(), "")
    print(f"everything lies in {out}", flush=True)
    ca = SmallCA(out / "certificates")
    tokens = out / "tokens"
    auth(["new-token", str(tokens), "--clients", str(NUM_CLIENTS + 1)])
    parties = _parties(options, tokens, ca)
    print(f"undisturbed: {options.rounds} rounds", flush=True)
    whole = honest_run(out / "undisturbed", parties, lambda address, run: None)
    print(f"attacked: {options.rounds} rounds", flush=True)
    attacker = Attacker(options.seconds, f"{tokens}.{NUM_CLIENTS}")
    other = honest_run(out / "attacked", parties, attacker.attack)
    whose = "a hop's" if options.hop else "the"
    disturbed = print_table(f"who reaches {whose} port; a run with tokens, TLS", attacker.table)
    if not options.hop:
        disturbed += print_table("whose certificate is not the clients'", uninvited(out, ca))
    harm = insider(out, hop=options.hop)
    disturbed += print_table("a client of the run; one that means harm", harm)
    disturbed += greedy(out, hop=options.hop)
    found = compare(whole.folder, other.folder)
    print(f"\n{found.tensors} tensors of the two runs compared, {found.count} differ")
    for line in found.lines[:10]:
        print(line)
    print_times(other, attacker)
    return disturbed + found.count


def _parties(options: Namespace, tokens: Path, ca: SmallCA) -> Options:
    """Return all parties' options; with a hop, clients prove their tokens there."""
    server = [*RUN, "--clients", str(NUM_CLIENTS), "--rounds", str(options.rounds)]
    trust = ["--tls-ca", str(ca.cert)]
    clients = [[*trust, "--token-file", f"{tokens}.{k}"] for k in range(NUM_CLIENTS)]
    asks = ["--token-file", str(tokens)]
    if not options.hop:
        return Options([*server, *asks, *ca.issue("server")], clients)
    between = str(tokens.with_name("between"))
    auth(["new-token", between])
    server += [*OVER_HOP, "--token-file", between, *ca.issue("server")]
    hop = ["--transport", "ws", *asks, "--next-token-file", between, *trust, *ca.issue("hop")]
    return Options(server, clients, hop)


def print_times(run: Honest, attacker: Attacker) -> None:
    """Print a round's time with and without the attacker."""
    calm, busy = _by_stretch(run, attacker.stretches)
    if not (calm and busy):
        print("too few whole rounds with and without attacks to compare: give more --rounds")
        return
    ratio = statistics.median(busy) / statistics.median(calm)
    print(
        f"a round took {statistics.median(busy):.3f} s while attacked ({len(busy)} rounds) and"
        f" {statistics.median(calm):.3f} s while not ({len(calm)}): {ratio:.2f} times;"
        f" the attacker used {attacker.processors():.2f} of a processor"
    )


def _wait(run: Honest, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not run.over and time.monotonic() < until:
        time.sleep(0.05)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _by_stretch(
    run: Honest, attacked: list[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Return the seconds of the rounds that were wholly calm, and of those wholly attacked."""
    calm, busy = [], []
    for began, ended, seconds in zip(
        run.ended_at, run.ended_at[1:], run.seconds()[1:], strict=False
    ):
        if any(first <= began and ended <= last for first, last in attacked):
            busy.append(seconds)
        elif all(ended < first or began > last for first, last in attacked):
            calm.append(seconds)
    return calm, busy
