"""A process and all that it has started: stop, go on, count, end. Linux only: it reads /proc."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


class Tree:
    """A process and all that it has started."""

    def __init__(self, *roots: int) -> None:
        self._roots = roots

    def pids(self) -> list[int]:
        found, num_seen = list(self._roots), 0
        while num_seen < len(found):
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{found[num_seen]}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
            num_seen += 1
        return found

    def signal(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let the processes run for a while."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def cpu_s(self) -> float:
        """Return the processor seconds that they have used."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        """Return the sum of what each of them has had in memory at most, with shared pages."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    total += int(line.split()[1]) * 1024 if line.startswith("VmHWM:") else 0
        return total

    def end(self) -> None:
        """End them; what does not end when it is asked to is killed."""
        pids = self.pids()
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.signal(number)
        deadline = time.monotonic() + 5
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in filter(_runs, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
