"""Named points at which a process can be made to die, for tests of recovery.

``SFL_CRASH_AT=checkpoint.before_rename:3`` kills the process, as SIGKILL does, when it gets to that
point for the third time. Nothing but tests sets it.
"""

import functools
import os
import signal
from collections import Counter

VARIABLE = "SFL_CRASH_AT"
POINTS = (
    "start.registered",  # a client is registered; it has not loaded its data
    "start.ready",  # everyone is ready; nothing has been written
    "file.before_rename",  # a model, log or tensor lies under its temporary name
    "file.after_rename",  # ... under its own, but is in no manifest
    "manifest.after_lines",  # of one step's tensors, or of one file
    "step.before_answer",  # the gradients are computed
    "step.after_answer",  # they are on their way; the back is not updated
    "step.after_update",
    "front.before_update",  # a client has the gradients
    "front.after_update",
    "trained.before_said",  # a client has taken all its steps
    "weights.before_put",
    "weights.after_put",
    "average.before",
    "average.after",
    "validation.before",  # a client has what the round gave
    "validation.after",  # all figures are in; nobody has been told
    "round.told",  # the clients know that the round is over; nothing says so on disk
    "rounds_csv.before",
    "rounds_csv.after",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.after_removal",  # of the last but one
    "run.before_goodbye",  # all rounds are done
    "run.after_goodbye",
)
_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    if (chosen := _chosen()) is None:
        return
    assert name in POINTS, name
    wanted, _, count = chosen.partition(":")
    if name == wanted:
        _reached[name] += 1
        if _reached[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


@functools.cache  # a step passes ten points, and the environment takes its time to say no
def _chosen() -> str | None:
    return os.environ.get(VARIABLE)
