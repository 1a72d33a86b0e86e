"""What each client does at the moment, as the server or a hop sees it, for ``status.json``.

Called on another thread than the run's: what it looks at may change between two lines.
"""

from collections.abc import Collection, Mapping

from sfl.archive.live_status import AWAY, EVALUATING, LOADING, TRAINING, WAITING, Doing, Now
from sfl.conversation.followed import FollowedRounds
from sfl.runtime.roster import Roster
from sfl.runtime.rounds import Rounds
from sfl.strategy.order import RoundPlan
from sfl.wire.link import Link
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


def in_followed(rounds: FollowedRounds, links: Mapping[int, Link]) -> Now:
    """Return what the clients do at a hop, or at the server of a further task.

    ``links``: of the clients that are connected.
    """
    plan = rounds.plan
    doings: dict[int, Doing] = {}
    for k in rounds.num_samples:
        if k not in links:
            doings[k] = Doing(AWAY, "it is not connected")
        elif plan is None:
            doings[k] = Doing(WAITING)
        else:
            at = links[k].at  # in the steps with this client
            steps = at.step if at.round == plan.round_index else 0
            steps = plan.num_steps.get(k, 0) if k in rounds.trained else steps
            doings[k] = _doing(plan, k, steps, all_have_trained=rounds.has_trained())
    return Now(rounds.next_round if plan is None else plan.round_index, doings)


def _in_round(rounds: Rounds, plan: RoundPlan, client: int) -> Doing:
    seen = rounds.log.num_steps(rounds.recipe.leader(client))
    steps = max(seen, _told_steps(plan, rounds.parties[client].link))
    return _doing(plan, client, steps, all_have_trained=plan.all_have_trained(rounds.parties))


def _doing(plan: RoundPlan, client: int, steps: int, *, all_have_trained: bool) -> Doing:
    of_steps = plan.num_steps.get(client, 0)  # none if it sits the round out
    what = TRAINING if plan.is_training(client) else WAITING
    return Doing(EVALUATING if all_have_trained else what, "", min(steps, of_steps), of_steps)


def _told_steps(plan: RoundPlan, link: Link) -> int:
    """Return the steps of a client that its heartbeats tell of."""
    at = link.peer_at if isinstance(link, Member) else None
    return at.step if at and at.round == plan.round_index else 0
