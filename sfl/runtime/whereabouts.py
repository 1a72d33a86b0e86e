"""What each client does at the moment, as the server sees it, for ``status.json``.

Called on another thread than the run's: what it looks at may change between two lines.
"""

from collections.abc import Collection

from sfl.archive.live_status import AWAY, EVALUATING, LOADING, TRAINING, WAITING, Doing, Now
from sfl.runtime.roster import Roster
from sfl.runtime.rounds import Rounds
from sfl.strategy.order import RoundPlan
from sfl.wire.members import Member


def in_lobby(roster: Roster) -> Now:
    """Return what the clients do before the first round."""
    places = dict(roster.places)
    doings: dict[int, Doing] = {}
    for k in sorted(roster.ids if len(roster.ids) == roster.needed else places):
        place = places.get(k)
        if place is None or place.link is None:
            doings[k] = Doing(AWAY, place.why if place and place.why else "it has not come yet")
        else:
            doings[k] = Doing(WAITING if place.ready else LOADING)
    return Now(-1, doings)


def in_rounds(rounds: Rounds, loading: Collection[int] = ()) -> Now:
    """Return what the clients do in a round; ``loading``: those that have come back to it."""
    plan, network = rounds.plan, rounds.network
    doings: dict[int, Doing] = {}
    for k in rounds.parties:
        if k in loading:
            doings[k] = Doing(LOADING)
        elif not network.is_here(k):
            doings[k] = Doing(AWAY, network.why_away(k))
        elif plan is None:
            doings[k] = Doing(WAITING)
        else:
            doings[k] = _in_round(rounds, plan, k)
    return Now(rounds.first_round if plan is None else plan.round_index, doings)


def _in_round(rounds: Rounds, plan: RoundPlan, client: int) -> Doing:
    of_steps = plan.num_steps.get(client, 0)  # none if it sits the round out
    steps = min(_steps(rounds, plan, client), of_steps)
    if plan.all_have_trained(rounds.parties):
        return Doing(EVALUATING, steps=steps, of_steps=of_steps)
    what = TRAINING if plan.is_training(client) else WAITING
    return Doing(what, steps=steps, of_steps=of_steps)


def _steps(rounds: Rounds, plan: RoundPlan, client: int) -> int:
    """Return a client's steps: those that the server has seen, or heartbeats tell of."""
    link, seen = rounds.parties[client].link, rounds.log.num_steps(rounds.recipe.leader(client))
    if isinstance(link, Member) and link.peer_at.round == plan.round_index:
        return max(seen, link.peer_at.step)
    return seen
