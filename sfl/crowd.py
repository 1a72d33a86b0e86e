"""When the programs of a run on one machine are more than its cores: who gives way to whom.

All clients wait for the server. Where each program has a core, whoever waits looks again and again
(``sfl.spin``). Where they share, looking takes time from those who compute, and a server that has
to wait for a core lets all clients wait: so nobody looks, and the server's clients go behind it.
Where each has a copy of the back, only so many train at the same time as have a core, if that is
faster.
"""

import os
from collections import defaultdict, deque
from statistics import median

WORTH_TRYING_S = 8e-3  # for a step; of longer ones, what is lost by sharing a core is a small part
TRIES = 3  # rounds each, so that one that was disturbed does not decide
MEMORY = 5  # rounds each
LOWEST_PRIORITY = 19  # "nice" of those who run when nobody else wants the core


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_crowded(num_programs: int) -> bool:
    """Say whether so many programs on this machine have to share its cores."""
    return num_programs > num_cores()


def most_that_fit(num_clients: int) -> int:
    """Return how many of the clients on the server's machine can have a core each; 0: all."""
    most = max(num_cores() - 1, 1)
    return most if num_clients > most else 0


def fits(at_once: int) -> bool:
    """Say whether so few clients train at the same time that each has a core here; 0: all do."""
    return at_once > 0 and not is_crowded(1 + at_once)


class Pace:
    """How many clients train at the same time where all of them share the cores of one machine.

    As many as fit, or all: what the rounds so far took says which. A core that goes from one
    program to another finds neither's data in its caches, which costs the same for a step of two
    milliseconds as for one of twenty; but long steps of several clients fill all cores.
    """

    def __init__(self) -> None:
        self._is_warm = False  # a process's first round takes longer
        # What a step took in the last rounds, by how many trained at once.
        self._took: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))

    def choose(self, most: int) -> int:
        """Return how many are to train at once, 0 for all, if ``most`` fit; 0: all do."""
        took_all, took_few = self._took[0], self._took[most]
        if not (most and took_all) or min(took_all) > WORTH_TRYING_S:
            return 0
        if len(took_few) < TRIES:
            return most if len(took_all) > len(took_few) else 0
        return most if median(took_few) < median(took_all) else 0

    def note(self, at_once: int, step_s: float) -> None:
        """Take note of what a step took in a round."""
        if self._is_warm:
            self._took[at_once].append(step_s)
        self._is_warm = True


def give_way() -> None:
    """Let every other program on this machine go first, from now on and for good.

    On Linux that is of this thread, and of those that it starts. Windows has no such thing.
    """
    if hasattr(os, "nice"):
        os.nice(LOWEST_PRIORITY)
