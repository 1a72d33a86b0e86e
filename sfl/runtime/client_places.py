"""The state of each client of a run at the server: connected, ready, lost or refused."""

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

# Rate limits (burst, seconds per further one): of taking over a place whose connection is open, and
# of taking a free place. An unreliable link needs far fewer.
TAKEN_OVER, TAKEN = (8, 3.0), (200, 0.1)
LEAST_EVALUATION_BATCH = 32  # samples; real evaluation batches are larger


@dataclass(frozen=True)
class Patience:
    """Whether lost clients may return, and how long a round waits for them."""

    may_return: bool = True  # else the first loss ends the run
    skip_after_s: float | None = None  # close the round without clients absent this long
    min_clients: int = 1  # with fewer connected, wait for the absent ones after all


@dataclass
class Place:
    """One client's place in the run."""

    instance: str = ""  # the random id of the client's process
    link: Member | None = None
    ready: bool = False  # its data are loaded
    joined: Joined | None = None  # its registration when it was last ready
    clock: StallClock = field(default_factory=StallClock)
    why: str = ""  # the reason of its absence
    is_skipped: bool = False  # rounds run without the client until it returns
    refused: bool = False  # the server refused the client: it must be corrected
    recurring: bool = False  # the client failed, and would fail again if restarted unchanged
    skipped_round: int = -1  # this round runs without the client, even if it returns
    takeovers: RateLimit = field(default_factory=lambda: RateLimit(*TAKEN_OVER))
    taken: RateLimit = field(default_factory=lambda: RateLimit(*TAKEN))

    @property
    def is_here(self) -> bool:
        return self.ready and self.link is not None

    @property
    def has_left(self) -> bool:
        """Whether the client was here, and is refused, failed or lost."""
        return bool(self.why) and self.link is None

    def free(self, error: SflError) -> None:
        """Free the place of a client that is lost, has failed, or was refused."""
        self.refused, self.recurring = not isinstance(error, PASSING), isinstance(error, RECURRING)
        self.link, self.ready, self.why = None, False, str(error)

    def step(self, recipe: Recipe, round_index: int) -> Step:
        """Return the step that the client's heartbeats name, if it is a possible one.

        Only for clients that train alone; with a cut the messages themselves show progress.
        """
        run, alone = recipe.run, recipe.scheme.exchange is Exchange.NOTHING
        if not (alone and self.joined and self.link):
            return NO_STEP
        samples, at = self.joined.data.num_samples, self.link.peer_at
        most = num_batches(samples[TRAIN], run.batch_size) * run.local_epochs
        most += sum(samples[part] // LEAST_EVALUATION_BATCH + 1 for part in (VALIDATION, TEST))
        return (at.round, at.step) if at.round == round_index and at.step <= most else NO_STEP


def check_any_can_return(places: Iterable[Place]) -> None:
    """Check that a client is connected or may return.

    Raises:
        RunError: every client has failed, and would fail again.
    """
    places = list(places)
    if all(place.recurring and not place.link for place in places):
        raise RunError(f"no client can go on, each would fail again: {places[0].why}")


def is_refusal(error: SflError) -> bool:
    """Return whether an error is the server's refusal, not the client's loss or failure."""
    return not isinstance(error, (*PASSING, PeerFailed))
