"""Cases run by processes of their own, with a limit on time, and what came of them."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType

from experiments.fuzz.cases import CASES
from experiments.fuzz.mutation import flip, mutate
from sfl.errors import Damaged, IntegrityError, ProtocolError

HANG_S = 5.0  # of a case that takes a millisecond


class Hangs(BaseException):
    """A case took too long."""


@dataclass
class Report:
    """What came of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    grown_bytes: int = 0  # the most that one process took beyond what it had after a warm-up

    def add(self, other: "Report") -> None:
        self.outcomes += other.outcomes
        self.failures += other.failures
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.grown_bytes = max(self.grown_bytes, other.grown_bytes)


def run(kind: str, seed: int, first: int, count: int) -> Report:
    """Run the cases ``first`` to ``first + count`` of a kind."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"took longer than {HANG_S:g} s")

    signal.signal(signal.SIGALRM, hang)
    make, check = CASES[kind]
    change = flip if kind == "flips" else mutate
    corpus, report, before = make(), Report(), 0
    for number in range(first, first + count):
        draws = random.Random(f"{seed} {kind} {number}")
        data = change(draws.choice(corpus), draws, corpus)
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            outcome = check(data)
        except (ProtocolError, Damaged, IntegrityError) as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = "FAILURE"
            report.failures.append(f"{kind} {number}: {type(error).__name__}: {error}")
            if isinstance(error, KeyboardInterrupt | MemoryError):
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        report.outcomes[outcome] += 1
        report.slowest_s = max(report.slowest_s, time.perf_counter() - started)
        if number == first + min(count // 10, 2000):
            before = peak_bytes()
    report.grown_bytes = peak_bytes() - (before or peak_bytes())
    return report


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(counts: Mapping[str, int], seed: int, workers: int) -> dict[str, Report]:
    """Run so many cases of each kind, in processes of their own."""
    reports = {kind: Report() for kind in CASES}
    jobs = []
    for kind, count in counts.items():
        share = -(-count // workers) if count else 0
        jobs += [(kind, seed, n, min(share, count - n)) for n in range(0, count, max(share, 1))]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        sys.path.insert(0, here)
        os.environ["PYTHONPATH"] = here
        os.chdir(folder)
        try:
            with context.Pool(workers) as pool:
                for job, report in zip(jobs, pool.starmap(run, jobs), strict=True):
                    reports[job[0]].add(report)
            if left := os.listdir(folder):
                reports["files"].failures.append(f"files were written: {left}")
        finally:
            os.chdir(here)
    return reports
