"""The table of schemes: a row says what clients and server share.

Every scheme runs the same rounds (``sfl.runtime.rounds``): the round's clients train, the trained
segments are averaged or relayed, and all clients evaluate the result. So ``sflv1`` and ``sflv2``
differ in one field: each client has a copy of the back, averaged after the round, or all share one,
which takes step i of every client in the round's order before step i+1 (``sfl.strategy.order``).
``docs/schemes/`` has a page for each scheme, with its messages and source.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum


class Exchange(Enum):
    """What a step sends; ``sfl.conversation.step`` has both ends of each."""

    CUT = "activations and labels up, the activations' gradients down"
    WEIGHT_GRADS = "the gradients of all weights up, the updated weights down"
    NOTHING = "nothing: the client trains the whole model alone"


class Fronts(Enum):
    """What happens to the clients' fronts after a round, in ``sfl.strategy.merge``."""

    AVERAGED = "averaged by the aggregation rule; all clients start from the average"
    RELAYED = "clients train one after another, each from the front of the one before"
    OWN = "each client keeps its own; fronts are not sent"


def shared(client: int) -> int:
    """Return the only back, which all clients share."""
    return 0


def a_copy_each(client: int) -> int:
    """Return a client's own copy of the back; copies are averaged after the round."""
    return client


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One scheme."""

    source: str
    back_of: Callable[[int], int] = shared  # client -> copy of the back that takes its steps
    fronts: Fronts = Fronts.AVERAGED
    exchange: Exchange = Exchange.CUT
    pooled: bool = False  # one client has the union of all parts; in simulation only

    def backs_of(self, clients: Iterable[int]) -> set[int]:
        """Return the copies of the back that take these clients' steps."""
        return {self.back_of(k) for k in clients}


SCHEMES: dict[str, Scheme] = {
    "sl": Scheme(
        source="Gupta & Raskar, JNCA 2018 (arXiv 1810.06060), Algorithm 2",
        back_of=shared,
        fronts=Fronts.RELAYED,
    ),
    "sflv1": Scheme(
        source="Thapa et al., SplitFed, AAAI 2022 (arXiv 2004.12088), Algorithms 1 and 2",
        back_of=a_copy_each,
        fronts=Fronts.AVERAGED,
    ),
    "sflv2": Scheme(
        source="Thapa et al., SplitFed, AAAI 2022 (arXiv 2004.12088), SFLV2",
        back_of=shared,
        fronts=Fronts.AVERAGED,
    ),
    "sflv3": Scheme(
        source="Gawali et al., 2021 (arXiv 2012.12591), SplitFedv3",
        back_of=a_copy_each,
        fronts=Fronts.OWN,
    ),
    "fl": Scheme(
        source="McMahan et al., AISTATS 2017 (arXiv 1602.05629), Algorithm 1",
        exchange=Exchange.NOTHING,
    ),
    "sync-sgd": Scheme(
        source="Chen et al., 2016 (arXiv 1604.00981), synchronous SGD without backup workers",
        exchange=Exchange.WEIGHT_GRADS,
    ),
    "central": Scheme(
        source="the baseline: one process trains on the union of all parts",
        pooled=True,
    ),
}
