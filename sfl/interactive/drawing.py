"""One look for all pictures: lines and bars can be told apart in grey, and by the colour-blind.

Brightness, dashes and markers differ as well as hue; colours are those of Okabe and Ito (2008).
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Wide lines are drawn below, so that one that coincides with another is seen.
STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "linestyle": "-", "marker": "o", "lw": 1.5},
    {"color": "#0072b2", "linestyle": "-", "marker": "s", "lw": 4.0, "alpha": 0.6},
    {"color": "#e69f00", "linestyle": "-.", "marker": "^", "lw": 1.8},
    {"color": "#004d38", "linestyle": "--", "marker": "D", "lw": 1.3},
    {"color": "#cc79a7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v", "lw": 1.5},
    {"color": "#56b4e9", "linestyle": (0, (8, 3)), "marker": "P", "lw": 1.5},
    {"color": "#7f7f7f", "linestyle": (0, (1, 3)), "marker": "X", "lw": 1.5},
]
# Of lines alone: matplotlib writes each dot as a circle of many points into an SVG.
HATCHES = ["", "//", "||", "xx", "\\\\", "--", "++"]
_LOOK: Any = {
    "text.parse_math": False,  # names of runs and classes may have a $
    "svg.fonttype": "path",
    "svg.hashsalt": "sfl",  # the same picture is the same file
    "legend.frameon": False,
    "font.size": 9,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw and save in the one look."""
    with mpl.rc_context(_LOOK):
        yield


def line_style(number: int) -> dict[str, Any]:
    """Return the look of a line; from the eighth on, markers are hollow."""
    lap, index = divmod(number, len(STYLES))
    return STYLES[index] | ({"markerfacecolor": "white"} if lap else {})


def bar_style(number: int) -> dict[str, Any]:
    """Return the look of a bar, as the line's; from the eighth on, its edge is thick."""
    lap, index = divmod(number, len(STYLES))
    color = STYLES[index]["color"] if index else "#bbbbbb"
    return {"color": color, "hatch": HATCHES[index], "edgecolor": "black", "lw": 0.6 + 1.4 * lap}


def draw_line(
    axes: Axes, x: Any, middle: Any, style: dict[str, Any], *, label: str, band: Any = None
) -> None:
    """Draw a line with some markers, and a band of (lowest, highest) around it, if given."""
    every = max(1, len(middle) // 8)
    how = {"markevery": every, "markersize": 4, "zorder": 3 - style["lw"] / 10, **style}
    # What begins with "_" is left out of a legend.
    axes.plot(x, middle, label=f" {label}" if label.startswith("_") else label, **how)
    if band is not None:
        axes.fill_between(x, *band, color=style["color"], alpha=0.15, lw=0)


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Name both axes, with a grid behind."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def count_rounds(axes: Axes) -> None:
    """Let an axis of rounds have whole numbers alone."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def one_legend(figure: Figure, panels: Sequence[Axes], **how: Any) -> None:
    """Draw one legend for what all the panels have."""
    named = (axes.get_legend_handles_labels() for axes in panels)
    pairs = itertools.chain.from_iterable(zip(*of, strict=True) for of in named)
    handles = {label: handle for handle, label in pairs}
    figure.legend([*handles.values()], [*handles], **{"loc": "outside right center"} | how)
