"""What each party holds, what passes the cuts, and how long a step takes: a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.cuts.cost_of_cuts import ARROWS, Cuts

MOST_DRAWN = 60  # bars beside each other: those that send the fewest bytes in a step
LINKS = ["tab:green", "tab:purple", "tab:brown", "tab:olive"]


def draw(
    path: Path, title: str, found: Sequence[Cuts], input_bytes: int, default: int | None
) -> None:
    """Draw what each party holds, what passes the cuts, and how long a step takes."""
    if len(found) > MOST_DRAWN:
        fewest = sorted(found, key=lambda cuts: cuts.step_bytes_up)[:MOST_DRAWN]
        title += f"\nthe {MOST_DRAWN} of {len(found)} that send the fewest bytes in a step"
        found = [cuts for cuts in found if cuts in fewest]
    figure = Figure(figsize=(max(7, 1.5 + 0.45 * len(found)), 11), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    places = range(len(found))
    client, server, light = "tab:blue", "tab:orange", 0.45
    million = 1e6
    parameters, flops, smashed, seconds = panels
    _stack(parameters, places, [
        ([c.client.parameters / million for c in found], client, 1.0, "client"),
        ([c.server.parameters / million for c in found], server, 1.0, "server"),
    ])  # fmt: skip
    parameters.set_ylabel("parameters\n(millions)")
    _stack(flops, places, [
        ([c.client.training_flops / million for c in found], client, 1.0, "client"),
        ([c.server.training_flops / million for c in found], server, 1.0, "server"),
    ])  # fmt: skip
    flops.set_ylabel("training MFLOPs\na sample")
    _by_link(smashed, found)
    smashed.axhline(input_bytes / 1024, color="black", linestyle="--", label="the sample itself")
    _stack(seconds, places, [
        ([c.client.forward_ms for c in found], client, 1.0, "client, forward"),
        ([c.client.backward_ms for c in found], client, light, "client, backward"),
        ([c.server.forward_ms for c in found], server, 1.0, "server, forward"),
        ([c.server.backward_ms for c in found], server, light, "server, backward"),
    ])  # fmt: skip
    seconds.set_ylabel("a step of one\nbatch (ms)")
    seconds.set_xticks(places, [c.title for c in found], rotation=60, ha="right")
    seconds.set_xlabel("cuts: blocks in front of each, and the last of them")
    for axes in panels:
        for place in (p for p, c in enumerate(found) if c.cuts == (default,)):
            axes.axvspan(place - 0.5, place + 0.5, color="lightgrey", zorder=0, label="default cut")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panels[0].set_title(title, loc="left")
    figure.savefig(path, dpi=130)


def _by_link(axes: Axes, found: Sequence[Cuts]) -> None:
    """Draw the bytes of a sample's activations, a bar for each link, on a logarithmic scale."""
    givers = found[0].givers
    width = 0.8 / len(givers)
    for index, (link, holder) in enumerate(givers.items()):
        shift = (index - (len(givers) - 1) / 2) * width
        axes.bar(
            [place + shift for place in range(len(found))],
            [cuts.smashed[link] / 1024 for cuts in found],
            width,
            color=LINKS[index % len(LINKS)],
            label=f"link {link}, {ARROWS[holder]}",
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("smashed data\n(KiB a sample)")


def _stack(
    axes: Axes, places: Sequence[int], rows: Sequence[tuple[list[float], str, float, str]]
) -> None:
    """Draw bars upon each other, a colour, an opacity and a label for each row of values."""
    bottom = [0.0] * len(places)
    for values, colour, alpha, label in rows:
        axes.bar(places, values, bottom=bottom, color=colour, alpha=alpha, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
