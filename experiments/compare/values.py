"""The values of an option of a comparison that has many, as they are typed."""

import re
from collections.abc import Sequence

from sfl.errors import ConfigError


def names(option: str, text: str) -> list[str]:
    """Return the names of a list with commas; numbers belong to the name before them.

    Raises:
        ConfigError: one of them is there twice.
    """
    return distinct(option, re.split(r",(?=[a-z])", re.sub(r"\s", "", text)))


def distinct(option: str, found: Sequence[str]) -> Sequence[str]:
    """Return an option's values.

    Raises:
        ConfigError: one of them is there twice.
    """
    for name in found:
        if found.count(name) > 1:
            raise ConfigError(f"{option}: {name} is there twice")
    return found
