"""The schemes, as a table: a row says who shares what, and nothing else.

Every scheme runs the same rounds (``sfl.runtime.rounds``): the clients of the round train, what
they trained is averaged or handed on, and all clients evaluate the result. So ``sflv1`` and
``sflv2`` differ in one field: whether each client has a copy of the back, averaged after the round,
or all share one, which takes step i of every client in the round's drawn order before step i+1
(``sfl.strategy.order``). A page each, with its messages and its source, lies in ``docs/schemes/``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Exchange(Enum):
    """What passes in a step; ``sfl.conversation.step`` has both ends of each."""

    CUT = "activations and labels up, the activations' gradients down"
    WEIGHT_GRADS = "the gradients of all weights up, the updated weights down"
    NOTHING = "nothing: the client trains the whole model alone"


class Fronts(Enum):
    """What becomes of the clients' fronts at the end of a round; ``sfl.strategy.merge`` does it."""

    AVERAGED = "averaged by the aggregation rule; everyone goes on from the average"
    RELAYED = "clients train one after another, each from the front of the one before"
    OWN = "each client keeps its own; fronts never travel"


def shared(client: int) -> int:
    """Let all clients share one back."""
    return 0


def a_copy_each(client: int) -> int:
    """Give each client a copy of the back; the copies are averaged after the round."""
    return client


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One scheme."""

    source: str
    back_of: Callable[[int], int] = shared  # client -> which copy of the back takes its steps
    fronts: Fronts = Fronts.AVERAGED
    exchange: Exchange = Exchange.CUT
    pooled: bool = False  # one client holds the union of all parts: in simulation only

    @property
    def copies_back(self) -> bool:
        """Whether each client has a copy of the back."""
        return self.back_of is a_copy_each


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
