"""The places of a run's clients: who has each, whether it is there, and what became of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sfl.conversation.join import Joined
from sfl.conversation.party import TEST, TRAIN, VALIDATION
from sfl.data.client_data import num_batches
from sfl.errors import PASSING, RECURRING, PeerFailed, RunError, SflError
from sfl.runtime.stall_clock import NO_STEP, StallClock, Step
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.transport.rate_limit import RateLimit
from sfl.wire.members import Member

# How often a place may be taken over from a connection that is open, and how often a free one may
# be taken: so often at once, then every so many seconds. A flaky link needs far less.
TAKEN_OVER, TAKEN = (8, 3.0), (200, 0.1)
LEAST_EVALUATION_BATCH = 32  # samples of a batch of validation or test: fewer than there are


@dataclass(frozen=True)
class Patience:
    """For how long clients that are away are waited for, and whether they may be."""

    may_return: bool = True  # else the first loss ends the run
    skip_after_s: float | None = None  # a round closes without who is away for so long
    min_clients: int = 1  # that must be there; else whoever is away is waited for all the same


@dataclass
class Place:
    """One client's place in the run."""

    instance: str = ""  # the process that has it
    link: Member | None = None
    ready: bool = False  # its data are loaded
    joined: Joined | None = None  # what it was when it was last ready
    clock: StallClock = field(default_factory=StallClock)
    why: str = ""  # it is away
    is_skipped: bool = False  # the rounds go on without it until it is back
    refused: bool = False  # what it did was wrong: the same again is of no use
    would_recur: bool = False  # it has failed in a way in which it would fail again
    skipped_round: int = -1  # the round that goes on without it, even when it is back
    takeovers: RateLimit = field(default_factory=lambda: RateLimit(*TAKEN_OVER))
    taken: RateLimit = field(default_factory=lambda: RateLimit(*TAKEN))

    @property
    def is_here(self) -> bool:
        return self.ready and self.link is not None

    def free(self, error: SflError) -> None:
        """Take note that the client is lost, has failed, or was refused."""
        self.refused, self.would_recur = (
            not isinstance(error, PASSING),
            isinstance(error, RECURRING),
        )
        self.link, self.ready, self.why = None, False, str(error)

    def step(self, recipe: Recipe, round_index: int) -> Step:
        """Return the step of a round that the client says it is at; no more steps than it has.

        It counts where the client trains alone: with a cut its messages tell.
        """
        run, alone = recipe.run, recipe.scheme.exchange is Exchange.NOTHING
        if not (alone and self.joined and self.link):
            return NO_STEP
        samples, at = self.joined.data.num_samples, self.link.peer_at
        most = num_batches(samples[TRAIN], run.batch_size) * run.local_epochs
        most += sum(samples[part] // LEAST_EVALUATION_BATCH + 1 for part in (VALIDATION, TEST))
        return (at.round, at.step) if at.round == round_index and at.step <= most else NO_STEP


def check_any_can_return(places: Iterable[Place]) -> None:
    """See that somebody is here, or may come back.

    Raises:
        RunError: each client has failed, in a way in which it would fail again.
    """
    places = list(places)
    if all(place.would_recur and not place.link for place in places):
        raise RunError(f"no client can go on, each would fail again: {places[0].why}")


def is_refusal(error: SflError) -> bool:
    """Say whether it is we who refuse a client, and not the client that left or failed."""
    return not isinstance(error, (*PASSING, PeerFailed))
