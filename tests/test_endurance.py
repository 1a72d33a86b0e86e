"""Many rounds in one tree of processes: what they hold at the end is what they held early on."""

import os
import re
import signal
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

from sfl.crash import VARIABLE
from tests.support.launch import Launcher, Program, send_signal, wait_for, was_killed

ROUNDS, EARLY = 250, 20
MARGIN = 0.05


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    kilobytes: int
    threads: int
    files: int

    @classmethod
    def by(cls, program: Program) -> "Held":
        """Return the least of a moment: what is being written just then is open as well."""
        samples = []
        for _ in range(20):
            samples.append(cls._now(program))
            program.process.join(0.02)
        return cls(*(min(values) for values in zip(*map(astuple, samples), strict=True)))

    @classmethod
    def _now(cls, program: Program) -> "Held":
        folder = Path("/proc") / str(program.process.pid)
        status = (folder / "status").read_text()
        found = {name: re.search(rf"{name}:\s+(\d+)", status) for name in ("VmRSS", "Threads")}
        counts = [int(match[1]) for match in found.values() if match]
        return cls(*counts, len(os.listdir(folder / "fd")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_nothing_grows_over_many_rounds(launcher: Launcher) -> None:
    """Memory, threads and open files, on server and clients; one client is lost and back."""
    options = ["--model", "mlp", "--batch-size", 500, "--keep-tensors", "last"]
    server = launcher.server("--clients", 2, "--rounds", 2 * ROUNDS, *options)
    crash = {VARIABLE: "front.before_update:30"}
    stays, dies = launcher.client("--client-id", 0), launcher.client("--client-id", 1, env=crash)
    was_killed(dies)
    back = launcher.client("--client-id", 1)
    programs = [server, stays, back]
    wait_for(server, f"round {EARLY}/")
    early = [Held.by(program) for program in programs]
    wait_for(server, f"round {ROUNDS}/")
    late = [Held.by(program) for program in programs]
    for before, after in zip(early, late, strict=True):
        assert after.kilobytes <= before.kilobytes * (1 + MARGIN), (before, after)
        # What is lost in a round would be lost in each: a file that is just being written is not.
        # Nor is a connection's writer, which begins when a socket is full for the first time.
        assert after.threads <= before.threads + 2, (before, after)
        assert after.files <= before.files + 1, (before, after)
    for program in programs:
        send_signal(program, signal.SIGINT)
        program.ended_with(3)
