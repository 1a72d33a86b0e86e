"""Class names in messages; names that look alike are shown with their code points."""

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence

MOST_SHOWN = 12  # names in a list
MOST_POINTS = 4  # names in a list that are shown with code points


def _seen(name: str) -> str:
    """Return a text that is equal for names that look alike (accents, spaces, zero width)."""
    visible = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(visible).split())


def listed(names: Sequence[str], others: Collection[str]) -> str:
    """Return the number of names and the first few; those that ``others`` lacks come first.

    Of these, names that are not ASCII, or look like one of ``others``, have their code points.
    """
    looks = {_seen(name).casefold() for name in others}
    missing = [name for name in names if name not in others]
    alike = [n for n in missing if not n.isascii() or _seen(n).casefold() in looks][:MOST_POINTS]
    if len(names) > MOST_SHOWN:
        names = missing + [name for name in names if name in others]
    shown = ", ".join(with_code_points(n) if n in alike else n for n in names[:MOST_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > MOST_SHOWN else ''})"


def with_code_points(name: str) -> str:
    """Return ``café [U+0065 U+0301]``: a name and its non-ASCII code points; all if it has none."""
    after = [*name[1:], ""]
    told = [
        c for c, following in zip(name, after, strict=True)
        if not "!" <= c <= "~" or unicodedata.combining(following or " ")
    ]  # fmt: skip
    return f"{name} [{' '.join(f'U+{ord(c):04X}' for c in told or name)}]"


def alike_among(names: Sequence[str]) -> list[str]:
    """Return the names that look like another one of them, with their code points."""
    looks = [_seen(name) for name in names]
    num = Counter(looks)
    return [with_code_points(n) for n, seen in zip(names, looks, strict=True) if num[seen] > 1]
