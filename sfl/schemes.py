"""The schemes, as a table: a row says who shares the back and nothing else.

Every scheme runs the same steps (``sfl.conversation``) and the same rounds (``sfl.rounds``): the
clients train together, then the fronts and the backs are averaged, each weighted by the training
samples behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sfl.config import unknown_name


@dataclass(frozen=True)
class Scheme:
    """One scheme."""

    source: str
    back_of: Callable[[int], int]  # client -> which copy of the back takes its steps


SCHEMES: dict[str, Scheme] = {
    "sflv1": Scheme(
        source="Thapa et al., SplitFed, AAAI 2022 (arXiv 2004.12088), Algorithms 1 and 2",
        back_of=lambda client: client,
    ),
}


def scheme(name: str) -> Scheme:
    """Return the scheme of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCHEMES:
        raise unknown_name("scheme", name, SCHEMES)
    return SCHEMES[name]
