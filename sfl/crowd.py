"""When the programs of a run on one machine are more than its cores: who gives way to whom.

All clients wait for the server. Where each program has a core, whoever waits looks again and again
(``sfl.spin``). Where they share, looking takes time from those who compute, and a server that has
to wait for a core lets all clients wait: so nobody looks, and the server's clients go behind it.
"""

import os

LOWEST_PRIORITY = 19  # "nice" of those who run when nobody else wants the core


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_crowded(num_programs: int) -> bool:
    """Say whether so many programs on this machine have to share its cores."""
    return num_programs > num_cores()


def fits(at_once: int) -> bool:
    """Say whether so few clients train at the same time that each has a core here; 0: all do."""
    return at_once > 0 and not is_crowded(1 + at_once)


def give_way() -> None:
    """Let every other program on this machine go first, from now on and for good.

    On Linux that is of this thread, and of those that it starts. Windows has no such thing.
    """
    if hasattr(os, "nice"):
        os.nice(LOWEST_PRIORITY)
