"""What lies on which side of each cut, what passes it, and how long a step takes: a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.cuts.cost_of_cuts import Cut


def draw(path: Path, title: str, cuts: list[Cut], input_bytes: int, default: int | None) -> None:
    """Draw what lies on which side, what passes the cut, and how long a step takes."""
    figure = Figure(figsize=(max(7, 1.5 + 0.45 * len(cuts)), 11), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True)
    places = range(len(cuts))
    client, server, light = "tab:blue", "tab:orange", 0.45
    million = 1e6
    parameters, flops, smashed, seconds = panels
    _stack(parameters, places, [
        ([c.client_parameters / million for c in cuts], client, 1.0, "client"),
        ([c.server_parameters / million for c in cuts], server, 1.0, "server"),
    ])  # fmt: skip
    parameters.set_ylabel("parameters\n(millions)")
    _stack(flops, places, [
        ([c.client_training_flops / million for c in cuts], client, 1.0, "client"),
        ([c.server_training_flops / million for c in cuts], server, 1.0, "server"),
    ])  # fmt: skip
    flops.set_ylabel("training MFLOPs\na sample")
    smashed.bar(places, [c.smashed_bytes / 1024 for c in cuts], color="tab:green")
    smashed.axhline(input_bytes / 1024, color="black", linestyle="--", label="the sample itself")
    smashed.set_yscale("log", base=2)
    smashed.yaxis.set_major_formatter("{x:g}")
    smashed.set_ylabel("smashed data\n(KiB a sample)")
    _stack(seconds, places, [
        ([c.client_forward_ms for c in cuts], client, 1.0, "client, forward"),
        ([c.client_backward_ms for c in cuts], client, light, "client, backward"),
        ([c.server_forward_ms for c in cuts], server, 1.0, "server, forward"),
        ([c.server_backward_ms for c in cuts], server, light, "server, backward"),
    ])  # fmt: skip
    seconds.set_ylabel("a step of one\nbatch (ms)")
    seconds.set_xticks(places, [f"{c.cut}: {c.last_block}" for c in cuts], rotation=60, ha="right")
    seconds.set_xlabel("cut: blocks on the client, and the last of them")
    for axes in panels:
        for place in (p for p, c in enumerate(cuts) if c.cut == default):
            axes.axvspan(place - 0.5, place + 0.5, color="lightgrey", zorder=0, label="default cut")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panels[0].set_title(title, loc="left")
    figure.savefig(path, dpi=130)


def _stack(
    axes: Axes, places: Sequence[int], rows: Sequence[tuple[list[float], str, float, str]]
) -> None:
    """Draw bars upon each other, a colour, an opacity and a label for each row of values."""
    bottom = [0.0] * len(places)
    for values, colour, alpha, label in rows:
        axes.bar(places, values, bottom=bottom, color=colour, alpha=alpha, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
