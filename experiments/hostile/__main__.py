"""Attack a running server in every way that we know, and say what it answered.

python -m experiments.hostile [--seconds N]
python -m experiments.hostile --memory
python -m experiments.hostile --server HOST:PORT [--seconds N] [--token-file FILE] [--folder RUN]

The third attacks a server of this machine that runs already, as whoever reaches its port; with
--token-file, as somebody who has a client's token besides. The first starts all itself: a run of
three honest clients with tokens and TLS, once alone and once with attacks in every other stretch of
rounds; then a server whose one client means harm, and one that wants clients' certificates; then
servers and clients whose memory the other side takes, which --memory tries alone. It
compares all weights, steps and figures of the two honest runs, and a round's time with and without
the attacker in the same run.

Attacks go to this machine's loopback alone. Exit code 0 if nobody was disturbed, else 1.
"""

import contextlib
import csv
import functools
import itertools
import resource
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.cli import run_program
from sfl.errors import shortened

if TYPE_CHECKING:
    from experiments.hostile.attacks import Target
    from experiments.support.small_ca import SmallCA

NUM_CLIENTS = 3
MOST_TRIES = 200  # of one attack
CALM_S = 10.0  # between attacks
PROBE_S = 10.0  # in which a server must answer
RUN = ["--model", "lenet5", "--batch-size", "128", "--run", "r"]
REFUSED_BYTES = 32 * 2**20  # by which a server may grow when it refuses a claim
CLIENT_BYTES = 400 * 2**20  # by which a client may, which imports its libraries meanwhile
SIGNS = (" is away", " is refused", "the run failed", "Traceback")  # in a server's log


@dataclass
class Row:
    """One attack: what came of it."""

    tries: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    disturbed: int = 0


Table = dict[str, Row]


class Watch:
    """Whether the honest run gets on while it is attacked."""

    def __init__(self, target: "Target", folder: Path | None) -> None:
        self._target, self._folder = target, folder
        self._seen = self._signs()

    def _signs(self) -> int:
        if self._folder is None:
            return 0
        log = (self._folder / "server_log.txt").read_text(errors="replace")
        return sum(log.count(sign) for sign in SIGNS)

    def disturbed(self) -> bool:
        """Say whether somebody was lost since the last time, or the server does not answer."""
        from experiments.hostile.attacks import HELLO, frame
        from sfl.wire.messages import MessageType

        seen, self._seen = self._seen, self._signs()
        deadline = time.monotonic() + PROBE_S
        answered = False
        while not answered and time.monotonic() < deadline:  # in a crowd it may take a few tries
            with contextlib.suppress(OSError):
                answer = self._target.ask(frame(HELLO, MessageType.AUTHENTICATE), frame())
                answered = answer.startswith((MessageType.INVALID_MESSAGE, MessageType.CHALLENGE))
        return self._seen > seen or not answered


def attack(target: "Target", table: Table, watch: Watch) -> None:
    """Try every attack: those that take long once, at the same time, the others until these end."""
    from experiments.hostile.attacks import SLOW_ATTACKS, quick_attacks
    from sfl.errors import SflError

    def one(name: str, attempt: Callable[["Target"], str]) -> None:
        row = table.setdefault(name, Row())
        row.tries += 1
        try:
            row.answers[attempt(target)] += 1
        except OSError as error:
            row.answers[f"{error.strerror or type(error).__name__}"] += 1
        except SflError as error:  # in a crowd: it had to make room
            row.answers[str(error)] += 1
        row.disturbed += watch.disturbed()

    quick = quick_attacks()
    slow = [threading.Thread(target=one, args=item) for item in SLOW_ATTACKS.items()]
    for thread in slow:
        thread.start()
    for name, attempt in itertools.cycle(quick.items()):
        if table.get(name, Row()).tries < MOST_TRIES:
            one(name, attempt)
        else:
            time.sleep(0.1)
        if not any(thread.is_alive() for thread in slow) and name == list(quick)[-1]:
            return


def print_table(title: str, table: Table) -> int:
    """Print what came of the attacks; return how many disturbed somebody."""
    print(f"\n{title}\n")
    print(f"{'attack':50s} {'tries':>5s} {'disturbed':>9s}  the server's answer")
    for name, row in table.items():
        (answer, count), *others = row.answers.most_common() or [("", 0)]
        more = f" ({count} times; {len(others)} other answers)" if others else ""
        print(
            f"{name:50.50s} {row.tries:5d} {row.disturbed or 'no':>9}"
            f"  {shortened(answer, 110)}{more}"
        )
    return sum(row.disturbed for row in table.values())


def target_of(address: str, token_file: str = "", *, tls: bool | None = None) -> "Target":
    """Return a server of this machine as a target, after finding out whether it speaks TLS.

    Raises:
        ConfigError: it is a server of another machine.
    """
    import ssl

    from experiments.hostile.attacks import Target, careless_tls, secured
    from sfl.errors import ConfigError
    from sfl.transport.addresses import is_loopback, parse_address
    from sfl.transport.tokens import read_tokens

    host, port = parse_address(address)
    if not is_loopback(host):
        raise ConfigError(f"--server {address}: is not on this machine; nothing else is attacked")
    target = Target(host, port, tokens=read_tokens(Path(token_file)) if token_file else None)
    if tls is None:
        with target.plain() as sock:
            try:
                secured(sock, careless_tls())
                tls = True
            except (ssl.SSLError, OSError):
                tls = False
    target.tls = tls
    return target


def attack_a_server(options: Namespace) -> int:
    """Attack a server that runs already."""
    target = target_of(options.server, options.token_file)
    deadline = time.monotonic() + options.seconds
    table: Table = {}
    watch = Watch(target, Path(options.folder) if options.folder else None)
    while time.monotonic() < deadline:
        attack(target, table, watch)
    return 1 if print_table(f"attacks on {options.server}", table) else 0


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


def honest_run(
    out: Path, server: list[str], clients: list[list[str]], meanwhile: Callable[[str, Honest], None]
) -> Honest:
    """Run a server and honest clients to their end, and something else beside them."""
    from experiments.support.processes import running

    with running([*server, "--out", str(out)]) as processes:
        common = ["--out", str(out)]
        addresses = [processes.address] * len(clients)
        processes.start_clients(addresses, common, lambda k: clients[k])
        run = Honest(out / "server" / processes.run)
        beside = threading.Thread(target=meanwhile, args=(processes.address, run))
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


def study(options: Namespace) -> int:
    """Attack runs that are started here."""
    from experiments.support.same_run import compare
    from experiments.support.small_ca import SmallCA
    from sfl.archive.run_folder import create_run_folder
    from sfl.auth import main as auth

    out = create_run_folder(Path(options.out).resolve(), "")
    print(f"everything lies in {out}", flush=True)
    ca = SmallCA(out / "certificates")
    tokens = out / "tokens"
    auth(["new-token", str(tokens), "--clients", str(NUM_CLIENTS + 1)])
    server = [*RUN, "--clients", str(NUM_CLIENTS), "--rounds", str(options.rounds)]
    server += ["--token-file", str(tokens), *ca.issue("server")]
    mine = [["--tls-ca", str(ca.cert), "--token-file", f"{tokens}.{k}"] for k in range(NUM_CLIENTS)]
    print(f"undisturbed: {options.rounds} rounds", flush=True)
    whole = honest_run(out / "undisturbed", server, mine, lambda address, run: None)
    attacked: list[tuple[float, float]] = []
    table: Table = {}
    spent: list[float] = []

    def attacker(address: str, run: Honest) -> None:
        target = target_of(address, f"{tokens}.{NUM_CLIENTS}", tls=True)
        watch = Watch(target, run.folder)
        end = time.monotonic() + options.seconds
        while not run.over and time.monotonic() < end:
            began, used = time.monotonic(), _processor_s()
            attack(target, table, watch)
            attacked.append((began, time.monotonic()))
            spent.append(_processor_s() - used)
            _wait(run, CALM_S)

    print(f"attacked: {options.rounds} rounds", flush=True)
    other = honest_run(out / "attacked", server, mine, attacker)
    disturbed = print_table("whoever reaches the port; a run with tokens and TLS", table)
    disturbed += print_table("whose certificate is not the clients'", uninvited(out, ca))
    disturbed += print_table("a client of the run; one that means harm", insider(out))
    disturbed += greedy(out)
    found = compare(whole.folder, other.folder)
    print(f"\n{found.tensors} tensors of the two runs compared, {found.count} differ")
    for line in found.lines[:10]:
        print(line)
    calm, busy = _by_window(other, attacked)
    wall = sum(end - began for began, end in attacked)
    if calm and busy:
        ratio = statistics.median(busy) / statistics.median(calm)
        print(
            f"a round took {statistics.median(busy):.3f} s while attacked ({len(busy)} rounds) and"
            f" {statistics.median(calm):.3f} s while not ({len(calm)}): {ratio:.2f} times;"
            f" the attacker used {sum(spent) / wall:.2f} of a processor"
        )
    else:
        print("too few whole rounds with and without attacks to compare: give more --rounds")
    return 1 if disturbed or found.count else 0


def _wait(run: Honest, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not run.over and time.monotonic() < until:
        time.sleep(0.05)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _by_window(run: Honest, attacked: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
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


@contextlib.contextmanager
def lone_server(
    out: Path, name: str, options: list[str], own_data: Path | None = None
) -> Iterator[str]:
    """Run a server that waits for client 0, and give its address."""
    from experiments.support.processes import running

    run = ["--clients", "1", "--model", "mlp", "--partition", "own", "--batch-size", "4"]
    with running([*run, "--run", name, "--rounds", "1", "--out", str(out), *options]) as processes:
        threading.Thread(target=lambda: list(processes.lines()), daemon=True).start()
        if own_data is not None:
            bystander = ["--client-id", "1", "--data-dir", str(own_data), "--out", str(out)]
            processes.start_client("client_1", processes.address, bystander)
        yield processes.address


def insider(out: Path) -> Table:
    """Let one of two clients do harm; each time it registers anew with a server that goes on."""
    from experiments.hostile.attacks import (
        insiders,
        takes_its_own_place,
        tls_to_plain_text,
        try_insider,
        write_bystander,
    )

    own_data = write_bystander(out / "bystander")
    with lone_server(out, "insider", ["--clients", "2"], own_data) as address:
        target = target_of(address, tls=False)
        attempts = {n: functools.partial(try_insider, target, h) for n, h in insiders().items()}
        attempts["its own place, 200 times"] = functools.partial(takes_its_own_place, target)
        attempts["TLS to a plain port"] = functools.partial(tls_to_plain_text, target)
        return try_each(attempts)


def uninvited(out: Path, ca: "SmallCA") -> Table:
    """Come to a server that wants clients' certificates without one, and with a wrong one."""
    from experiments.hostile.attacks import shows
    from experiments.support.small_ca import SmallCA

    shown = {
        "no certificate": [],
        "an expired certificate": ca.issue("expired", days=0),
        "a foreign certificate": SmallCA(ca.folder / "foreign").issue("client"),
    }
    with lone_server(
        out, "invited", ["--tls-client-ca", str(ca.cert), *ca.issue("other")]
    ) as address:
        target = target_of(address, tls=True)
        return try_each({n: functools.partial(shows, target, own) for n, own in shown.items()})


@contextlib.contextmanager
def measured_server(out: Path, options: list[str]) -> Iterator[tuple["Target", int]]:
    """Run a server, and give it as a target, with its process."""
    from experiments.support.processes import running
    from sfl.archive.run_folder import create_run_folder

    folder = create_run_folder(out, "")
    with running([*options, "--peer-timeout", "20", "--out", str(folder)]) as processes:
        threading.Thread(target=lambda: list(processes.lines()), daemon=True).start()
        yield target_of(processes.address, tls=False), processes.server.pid


def greedy(out: Path) -> int:
    """Take the memory of servers and of clients; print it, and return how many gave too much."""
    from experiments.hostile.memory import (
        CLAIMS,
        CUT,
        GREEDY,
        SERVER,
        WISHES,
        try_claim,
        try_greed,
        try_own_place,
    )

    print(f"\n{'who takes memory':50s} {'grown by':>9s} {'bound':>9s}  the answer", flush=True)
    num_over = 0

    def row(name: str, bound: int, grown: int, answer: str) -> None:
        nonlocal num_over
        num_over += grown > bound
        sizes = f"{grown / 2**20:5.0f} MiB {bound / 2**20:5.0f} MiB"
        print(f"{name:50.50s} {sizes}  {answer:.110}", flush=True)

    for name, greed in GREEDY.items():
        with measured_server(out, greed.server) as (target, process):
            row(name, greed.bound_bytes, *try_greed(target, process, greed))
    with measured_server(out, [*SERVER, *CUT]) as (target, process):
        row("its own place, 200 times", REFUSED_BYTES, *try_own_place(target, process))
    for name, (options, claim) in CLAIMS.items():
        with measured_server(out, options) as (target, process):
            row(name, REFUSED_BYTES, *try_claim(target, claim, process))
    for name, wish in WISHES.items():
        row(f"a server: {name}", CLIENT_BYTES, *_greedy_server(out, wish))
    return num_over


def _greedy_server(out: Path, wish: Mapping[str, object]) -> tuple[int, str]:
    """Let a client come to a server that names too much."""
    from experiments.hostile.memory import try_wish
    from experiments.support.processes import ROOT
    from sfl.archive.run_folder import create_run_folder
    from sfl.transport.listener import listen

    folder = create_run_folder(out, "")
    with listen("127.0.0.1", 0) as listener:
        options = ["--server", listener.address, "--out", str(folder), "--memory-limit", "1gb"]
        command = [sys.executable, "run_client.py", *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, **quiet) as client:
            try:
                return try_wish(listener, wish, client.pid)
            finally:
                client.kill()


def try_each(attempts: Mapping[str, Callable[[], str]]) -> Table:
    """Try each attack once; the server was disturbed if the next one finds nobody."""
    from sfl.errors import SflError

    table: Table = {}
    for name, attempt in attempts.items():
        row = table[name] = Row(tries=1)
        try:
            row.answers[attempt()] += 1
        except (OSError, SflError) as error:
            row.disturbed = 1
            row.answers[str(error)] += 1
    return table


def main() -> int:
    options = parse()
    if options.memory:
        return 1 if greedy(Path(options.out).resolve()) else 0
    return attack_a_server(options) if options.server else study(options)


def parse() -> Namespace:
    from sfl.options import Parser

    parser = Parser(prog="python -m experiments.hostile", description=__doc__.partition("\n")[0])
    parser.add_argument("--server", metavar="HOST:PORT", help="that runs already, on this machine")
    parser.add_argument("--memory", action="store_true", help="try alone what takes memory")
    parser.add_argument("--seconds", type=float, default=60.0, help="of attacks (default: 60)")
    parser.add_argument("--token-file", default="", help="the attacker's own, with --server")
    parser.add_argument("--folder", help="of the attacked run, to see whether it is disturbed")
    parser.add_argument("--rounds", type=int, default=150, help="of each run (default: 150)")
    parser.add_argument("--out", default="shared_files/hostile", help="for folders by start time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("hostile", main))
