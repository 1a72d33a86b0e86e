"""What the cuts of a model cost client and server: counted, timed, and shown as a table."""

import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from experiments.support.costs import costs_of, givers, times_of
from sfl.config import RunConfig
from sfl.data.client_data import DatasetSpec
from sfl.errors import ConfigError, counted
from sfl.model.topology import TOPOLOGIES, Holder, check_cuts, hops_of
from sfl.registry import named
from sfl.strategy.recipe import Recipe, parse_cuts
from sfl.strategy.split_model import SplitModel

MOST_LISTS = 1000  # of cuts that are measured: some seconds each, if the model is large
ARROWS = {Holder.CLIENT: "up", Holder.SERVER: "down"}  # the way of what each sends


@dataclass(frozen=True)
class Share:
    """What the segments of one party cost; FLOPs of one sample, milliseconds of one batch."""

    parameters: int
    forward_flops: int
    training_flops: int
    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class Cuts:
    """What the cuts of a run cost."""

    cuts: tuple[int, ...]
    last_blocks: tuple[str, ...]  # in front of each
    client: Share
    server: Share
    givers: dict[int, Holder]  # who sends activations, by link; as many gradients come back
    smashed: dict[int, int]  # bytes of one sample's activations, by link
    step_bytes_up: int  # of one batch: labels, activations and gradients, without files' heads
    step_bytes_down: int

    @property
    def client_share(self) -> float:
        """The clients' share of the FLOPs of training."""
        flops = self.client.training_flops, self.server.training_flops
        return flops[0] / max(sum(flops), 1)

    @property
    def title(self) -> str:
        """The cuts, each with the block in front of it."""
        pairs = zip(self.cuts, self.last_blocks, strict=True)
        return ", ".join(f"{cut} {name}" for cut, name in pairs)

    def row(self) -> dict[str, object]:
        """Return the line of ``cuts.csv``; a further cut's bytes have its link behind the name."""
        smashed = {
            f"smashed_bytes_{k}" if k else "smashed_bytes": n for k, n in self.smashed.items()
        }
        parties = {"client": asdict(self.client), "server": asdict(self.server)}
        return {
            "cut": ",".join(map(str, self.cuts)),
            "last_block": ",".join(self.last_blocks),
            **{f"{who}_{name}": n for who, costs in parties.items() for name, n in costs.items()},
            "client_share": self.client_share,
            **smashed,
            "step_bytes_up": self.step_bytes_up,
            "step_bytes_down": self.step_bytes_down,
        }


def lists_of_cuts(run: RunConfig, num_cuts: int | None, num_blocks: int) -> list[tuple[int, ...]]:
    """Return the lists of cuts to measure: that of ``--cut``, or all that have so many cuts.

    By default they have as many as ``--topology`` takes at least.

    Raises:
        ConfigError: there are none, or too many; or the topology has another number of
            cuts, or several models.
    """
    if run.cut is not None and num_cuts is not None:
        raise ConfigError("--cut gives the cuts, --num-cuts all that there are: give one of them")
    row = named("topology", run.topology, TOPOLOGIES) if run.topology else None
    if row and (row.joins or row.has_tasks):
        raise ConfigError(
            f"--topology {run.topology}: each client, or task, has a model of its own; leave the"
            " topology out to see what the cuts of one cost"
        )
    if row and hops_of(row.segments(row.num_cuts[0])):
        raise ConfigError(
            f"--topology {run.topology}: the table has clients and server alone; with alternating,"
            " each cut costs what it costs over a hop"
        )
    count = num_cuts or (row.num_cuts[0] if row else 1)
    found = math.comb(num_blocks - 1, count)
    if run.cut is not None:
        lists = [parse_cuts(run.cut, None, run.model)]
    elif not found:
        blocks = counted(num_blocks, "block")
        raise ConfigError(f"--model {run.model} has {blocks}: {counted(count, 'cut')} do not fit")
    elif found > MOST_LISTS:
        raise ConfigError(
            f"--model {run.model}: there are {found:,} ways to cut it {count} times, too many to"
            " measure; say with --cut which one"
        )
    else:
        lists = list(itertools.combinations(range(1, num_blocks), count))
    if row:
        check_cuts(run.topology, row, lists[0])
    return lists


def measure(
    run: RunConfig, lists: Iterable[tuple[int, ...]], spec: DatasetSpec, device: torch.device
) -> Iterator[Cuts]:
    """Count and time each list of cuts, for samples of these data.

    Raises:
        ConfigError: the model cannot be cut like this.
    """
    for cuts in lists:
        text = ",".join(map(str, cuts))
        cut_there = replace(run, cut=text, scheme="sflv1")  # any scheme with a cut
        split = SplitModel(Recipe.of(cut_there), spec.input_shape, len(spec.classes))
        senders = givers(split.recipe.segments)
        smashed = {link: split.features_spec(1, link).num_bytes for link in senders}
        tensors = run.batch_size * sum(smashed.values())
        labels = run.batch_size * split.recipe.task.label.num_bytes
        yield Cuts(
            cuts,
            tuple(split.block_names[cut - 1] for cut in cuts),
            *_shares(split, run, device),
            senders,
            smashed,
            step_bytes_up=tensors + labels * split.recipe.shares_labels,
            step_bytes_down=tensors,
        )


def _shares(split: SplitModel, run: RunConfig, device: torch.device) -> Iterator[Share]:
    """Yield what the clients' segments cost, and what the server's."""
    costs = costs_of(split, *Holder)
    times = times_of(split, run.batch_size, device)
    for holder in (Holder.CLIENT, Holder.SERVER):
        held = split.held_by(holder)
        yield Share(
            sum(costs[name].parameters for name in held),
            round(sum(costs[name].forward_flops for name in held)),
            round(sum(costs[name].training_flops for name in held)),
            *(1000 * sum(times[name][way] for name in held) for way in (0, 1)),
        )


def write_csv(path: Path, found: Sequence[Cuts]) -> None:
    """Write a line for each list of cuts."""
    rows = [cuts.row() for cuts in found]
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def columns(cuts: Cuts) -> list[tuple[str, str, int, str]]:
    """Return the columns of the table: group, title, width, and the value for these cuts."""
    client, server = cuts.client, cuts.server
    links = [
        ("smashed", f"{link} {ARROWS[holder]}", 9, f"{cuts.smashed[link]:,}")
        for link, holder in cuts.givers.items()
    ]
    return [
        ("parameters", "client", 11, f"{client.parameters:,}"),
        ("parameters", "server", 11, f"{server.parameters:,}"),
        ("training MFLOPs", "client", 9, f"{client.training_flops / 1e6:.2f}"),
        ("training MFLOPs", "server", 9, f"{server.training_flops / 1e6:.2f}"),
        ("training MFLOPs", "client's", 8, f"{100 * cuts.client_share:.1f} %"),
        *links,
        ("kB a step", "up", 9, f"{cuts.step_bytes_up / 1e3:,.1f}"),
        ("kB a step", "down", 9, f"{cuts.step_bytes_down / 1e3:,.1f}"),
        ("client ms", "forw.", 6, f"{client.forward_ms:.1f}"),
        ("client ms", "backw.", 6, f"{client.backward_ms:.1f}"),
        ("server ms", "forw.", 6, f"{server.forward_ms:.1f}"),
        ("server ms", "backw.", 6, f"{server.backward_ms:.1f}"),
    ]


def show(found: Iterable[Cuts], default: int | None) -> list[Cuts]:
    """Print a line for each list of cuts as it is measured, and return them all."""
    shown: list[Cuts] = []
    for cuts in found:
        row = columns(cuts)
        wide = 12 + 12 * len(cuts.cuts)
        if not shown:
            groups = itertools.groupby(row, lambda column: column[0])
            widths = ((title, sum(1 + c[2] for c in of)) for title, of in groups)
            print(f"{'cut behind':{wide}}" + "".join(f"{t:>{width}}" for t, width in widths))
            print(" " * wide + "".join(f" {title:>{width}}" for _, title, width, _ in row))
        mark = " *" if cuts.cuts == (default,) else ""
        values = "".join(f" {value:>{width}}" for _, _, width, value in row)
        print(f"{cuts.title + mark:{wide}}{values}", flush=True)
        shown.append(cuts)
    print(
        "smashed: bytes of a sample's activations over each link, up to the server or down from it;"
    )
    print(
        "as many of gradients go the other way. kB a step: of a batch, with labels if they are sent"
    )
    if any(cuts.cuts == (default,) for cuts in shown):
        print("* the model's own cut")
    return shown
