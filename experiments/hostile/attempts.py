"""Attacks tried one after the other, and the table of what came of them."""

import contextlib
import itertools
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments.hostile.strangers import SLOW_ATTACKS, quick_attacks
from experiments.hostile.target import HELLO, Target, frame, target_of
from sfl.errors import SflError, shortened
from sfl.wire.messages import MessageType

MOST_TRIES = 200  # of one attack
PROBE_S = 10.0  # in which a server must answer
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

    def __init__(self, target: Target, folder: Path | None) -> None:
        self._target, self._folder = target, folder
        self._seen = self._signs()

    def _signs(self) -> int:
        if self._folder is None:
            return 0
        log = (self._folder / "server_log.txt").read_text(errors="replace")
        return sum(log.count(sign) for sign in SIGNS)

    def disturbed(self) -> bool:
        """Say whether somebody was lost since the last time, or the server does not answer."""
        seen, self._seen = self._seen, self._signs()
        deadline = time.monotonic() + PROBE_S
        answered = False
        while not answered and time.monotonic() < deadline:  # in a crowd it may take a few tries
            with contextlib.suppress(OSError):
                answer = self._target.ask(frame(HELLO, MessageType.AUTHENTICATE), frame())
                answered = answer.startswith((MessageType.INVALID_MESSAGE, MessageType.CHALLENGE))
        return self._seen > seen or not answered


def attack(target: Target, table: Table, watch: Watch) -> None:
    """Try every attack: those that take long once, at the same time, the others until these end."""

    def one(name: str, attempt: Callable[[Target], str]) -> None:
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


def try_each(attempts: Mapping[str, Callable[[], str]]) -> Table:
    """Try each attack once; the server was disturbed if the next one finds nobody."""
    table: Table = {}
    for name, attempt in attempts.items():
        row = table[name] = Row(tries=1)
        try:
            row.answers[attempt()] += 1
        except (OSError, SflError) as error:
            row.disturbed = 1
            row.answers[str(error)] += 1
    return table


def attack_a_server(options: Namespace) -> int:
    """Attack a server that runs already; return how many attacks disturbed somebody."""
    target = target_of(options.server, options.token_file)
    deadline = time.monotonic() + options.seconds
    table: Table = {}
    watch = Watch(target, Path(options.folder) if options.folder else None)
    while time.monotonic() < deadline:
        attack(target, table, watch)
    return print_table(f"attacks on {options.server}", table)
