"""What a server's ranks tell each other in torchrun's store, before they can talk over gloo.

::

    rank r                                     rank 0
    word_r = its word                     ->
                                          <-   answer_<its word> = the attempt's name
    taken_<its word> = ""                 ->   once all have taken it, all are there

A word is new in each process. So what earlier attempts have left in the store does no harm, and
ranks need not have been started equally often: each of torchrun's agents counts its own failures.
"""

import contextlib
import time
import uuid
from typing import Protocol

from sfl.errors import RunError, duration

JOIN_WITHIN_S = 600.0  # as torchrun gives its agents on several machines to meet
LEAVE_WITHIN_S = 30.0
POLL_S = 0.05
_OWN_FOLDERS = "sfl/own_folders"


class Store(Protocol):
    """``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


def meet(store: Store, rank: int, size: int, within_s: float = JOIN_WITHIN_S) -> str:
    """Wait until all ranks are there; return the attempt's name, the same for all.

    Raises:
        RunError: they have not come in time.
    """
    until, word = time.monotonic() + within_s, uuid.uuid4().hex
    store.set(f"sfl/word_{rank}", word)
    others, is_there = (range(1, size), _has_taken) if rank == 0 else (range(1), _has_answered)
    while left := [other for other in others if not is_there(store, word, other)]:
        if time.monotonic() > until:
            named = ", ".join(map(str, left))
            raise RunError(
                f"rank {rank} of the server has waited {duration(within_s)} for rank {named}: start"
                " torchrun on every machine, with the same --nnodes and --nproc-per-node"
            )
        time.sleep(POLL_S)
    if rank == 0:
        return word
    name = store.get(f"sfl/answer_{word}").decode()
    store.set(f"sfl/taken_{word}", "")
    return name


def _has_answered(store: Store, word: str, other: int) -> bool:
    return store.check([f"sfl/answer_{word}"])


def _has_taken(store: Store, word: str, other: int) -> bool:
    """Answer another rank's newest word; return whether it has taken this attempt's name."""
    if not store.check([f"sfl/word_{other}"]):
        return False
    theirs = store.get(f"sfl/word_{other}").decode()
    if not store.check([f"sfl/answer_{theirs}"]):
        store.set(f"sfl/answer_{theirs}", word)
    is_ours = store.get(f"sfl/answer_{theirs}") == word.encode()
    return is_ours and store.check([f"sfl/taken_{theirs}"])


def leave(store: Store, rank: int, size: int, within_s: float = LEAVE_WITHIN_S) -> None:
    """Wait until all ranks have come here; ``store`` is this attempt's alone.

    Rank 0, which may hold the store, leaves when the others ask it nothing more.
    """
    until = time.monotonic() + within_s
    with contextlib.suppress(RuntimeError):
        store.set(f"come_{rank}", "")
        _wait_for(store, [f"come_{r}" for r in range(size)], until)
        if rank > 0:
            store.set(f"gone_{rank}", "")
        else:
            _wait_for(store, [f"gone_{r}" for r in range(1, size)], until)


def _wait_for(store: Store, keys: list[str], until: float) -> None:
    while not store.check(keys) and time.monotonic() < until:
        time.sleep(POLL_S)


def owns_folders(store: Store) -> bool:
    """Return whether the run's folders are of this start of torchrun: of an earlier attempt.

    torchrun's store outlives attempts.
    """
    return store.check([_OWN_FOLDERS])


def note_own_folders(store: Store) -> None:
    """Note that there was no run of that name when this start of torchrun began."""
    store.set(_OWN_FOLDERS, "")
