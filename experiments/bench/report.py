"""What ``experiments.bench`` found: tables for people and programs, and a picture."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from matplotlib.figure import Figure

from experiments.bench.contenders import Sample
from experiments.bench.rows import Row

COLUMNS = (
    "row", "contender", "blocks", "ms", "ms_low", "ms_high", "ratio", "overhead_ms", "bytes",
    "round_trips", "cpu_ms", "peak_mib", "archive_lag_s",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One contender in one row. Figures are of a step; of one step of every client."""

    row: Row
    contender: str
    samples: Sequence[Sample]
    ratios: Sequence[float]  # of its blocks to the arithmetic's just before them
    peak_bytes: int

    @property
    def ms(self) -> float:
        return median(s.seconds for s in self.samples) * 1e3

    @property
    def ratio(self) -> float:
        """How many times the arithmetic it takes, which takes itself once."""
        return median(self.ratios) if self.ratios else 1.0

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles, in milliseconds."""
        times = [s.seconds * 1e3 for s in self.samples]
        if len(times) == 1:
            return times[0], times[0]
        low, _, high = quantiles(times, n=4, method="inclusive")
        return low, high

    @property
    def cpu_ms(self) -> float:
        return median(s.cpu_s for s in self.samples) * 1e3

    def counted(self, name: str) -> float | None:
        """Return the median of something that not every contender counts."""
        found = [getattr(s, name) for s in self.samples]
        return None if None in found else median(found)

    def phases(self, side: str) -> dict[str, float]:
        """Return the median milliseconds of each phase of "client" or "server"."""
        found = [getattr(s, f"{side}_s") for s in self.samples]
        return {phase: median(of[phase] for of in found) * 1e3 for phase in found[0]}


def _figures(result: Result, alone: Result) -> dict[str, object]:
    low, high = result.spread
    return {
        "row": result.row.name, "contender": result.contender, "blocks": len(result.samples),
        "ms": result.ms, "ms_low": low, "ms_high": high, "ratio": result.ratio,
        "overhead_ms": (result.ratio - 1) * alone.ms, "bytes": result.counted("num_bytes"),
        "round_trips": result.counted("round_trips"), "cpu_ms": result.cpu_ms,
        "peak_mib": result.peak_bytes / 2**20,
        "archive_lag_s": max((s.archive_lag_s or 0.0 for s in result.samples), default=0.0),
    }  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """Return the Markdown table of one row; the first result is the arithmetic alone."""
    row = results[0].row
    clients = "1 client" if row.clients == 1 else f"{row.clients} clients"
    lines = [
        f"\n{row.model}, batch {row.batch_size}, {clients}\n",
        "| | ms a step | quartiles | ratio | more, ms | bytes | round trips | CPU ms | peak MiB |",
        "| --- |" + " ---: |" * 8,
    ]
    for result in results:
        f = _figures(result, results[0])
        num_bytes = "" if f["bytes"] is None else f"{f['bytes']:,.0f}"
        trips = "" if f["round_trips"] is None else f"{f['round_trips']:.2f}"
        lines.append(
            f"| {result.contender} | {f['ms']:.2f} | {f['ms_low']:.2f} to {f['ms_high']:.2f} |"
            f" {f['ratio']:.2f} | {f['overhead_ms']:+.2f} | {num_bytes} | {trips} |"
            f" {f['cpu_ms']:.2f} | {f['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def phases_table(results: Sequence[Result]) -> str:
    """Return where the time of our own steps goes, as a Markdown table in milliseconds."""
    lines = []
    for result in results:
        for side in ("client", "server"):
            if not (found := result.phases(side)):
                continue
            if not lines:
                lines = ["| ms a step | " + " | ".join(found) + " |", "| --- |" + " ---: |" * 9]
            cells = " | ".join(f"{ms:.3f}" if ms else "" for ms in found.values())
            lines.append(f"| {result.contender}, {side} | {cells} |")
    return "\n".join(["", *lines])


def write_all(out: Path, rows: Sequence[Sequence[Result]]) -> list[Path]:
    """Write the tables and the picture of some rows into a folder; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"bench.{kind}" for kind in ("csv", "md", "png")]
    with open(paths[0], "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_figures(r, results[0]) for results in rows for r in results)
    text = "\n".join(part for results in rows for part in (table(results), phases_table(results)))
    paths[1].write_text(text.strip() + "\n")
    _draw(paths[2], rows)
    return paths


def _draw(path: Path, rows: Sequence[Sequence[Result]]) -> None:
    """Draw how many times the arithmetic each contender takes; log scale."""
    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.6 + 2.1 * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(rows) :]:
        axes.axis("off")
    for axes, results in zip(grid.flat, rows, strict=False):
        row, others = results[0].row, results[1:]
        names = [result.contender for result in others]
        ratios = [result.ratio for result in others]
        ours = ["#0072b2" if name.startswith("SFL") else "#b0b0b0" for name in names]
        bars = axes.barh(names, ratios, color=ours)
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=2, fontsize=8)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xlim(0, max(ratios) * 1.18)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        clients = "1 client" if row.clients == 1 else f"{row.clients} clients"
        axes.set_title(f"{row.model}, batch {row.batch_size}, {clients}", fontsize=9)
    figure.supxlabel("time of a step, in times of the arithmetic alone in one process", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
