"""Named points at which tests kill a process, to check recovery.

``SFL_CRASH_AT=checkpoint.before_rename:3`` kills the process, as SIGKILL does, the third time it
reaches that point. Only tests set it.
"""

import functools
import os
import signal
from collections import Counter

VARIABLE = "SFL_CRASH_AT"
POINTS = (
    "start.registered",  # a client is registered and has not loaded its data
    "start.ready",  # all clients are ready; nothing is written
    "file.before_rename",  # a model, log or tensor has its temporary name
    "file.after_rename",  # ... its final name, but no line in a manifest
    "manifest.after_lines",  # for one step's tensors, or for one file
    "step.before_answer",  # the gradients are computed
    "step.after_answer",  # they are being sent; the back is not updated
    "step.after_update",
    "front.before_update",  # a client has the gradients
    "front.after_update",
    "trained.before_said",  # a client has taken all its steps
    "weights.before_put",
    "weights.after_put",
    "average.before",
    "average.after",
    "validation.before",  # a client has the round's result
    "validation.after",  # all figures have arrived; no client has been told
    "round.told",  # the clients know that the round is over; no file says so
    "rounds_csv.before",
    "rounds_csv.after",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.after_removal",  # of the oldest checkpoint
    "run.before_goodbye",  # all rounds are done
    "run.after_goodbye",
)
_reached: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill the process here if ``SFL_CRASH_AT`` says so."""
    if (chosen := _chosen()) is None:
        return
    assert name in POINTS, name
    wanted, _, count = chosen.partition(":")
    if name == wanted:
        _reached[name] += 1
        if _reached[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


@functools.cache  # a step passes ten points; reading the environment is slow
def _chosen() -> str | None:
    return os.environ.get(VARIABLE)
