"""The runs of a comparison: which combinations there are, and which cannot be."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sfl.config import RunConfig
from sfl.errors import ConfigError, counted
from sfl.nodes import NodeConfig
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange

MOST_SHOWN = 40  # characters of a partition, and what else makes a cell, in the name of a run
NONE = "-"  # what is swept, if nothing is
NO_CUT = "-"  # topology and cut of a scheme in which nothing crosses a cut


class Cell(NamedTuple):
    """One row of the tables, of as many runs as there are seeds."""

    partition: str
    scheme: str
    topology: str
    cut: str
    swept: str  # the values of the options of --sweep

    @classmethod
    def of(cls, recipe: Recipe, swept: str) -> "Cell":
        """Return the cell of a run; where nothing crosses a cut, all topologies are the same."""
        run, row = recipe.run, recipe.scheme
        crosses = row.exchange is Exchange.CUT and not row.pooled
        placed = (run.topology, str(run.cut)) if crosses else (NO_CUT, NO_CUT)
        return cls(run.partition, run.scheme, *placed, swept or NONE)


@dataclass(frozen=True)
class Study:
    """One comparison: the cells of its table, and where they lie."""

    schemes: Sequence[str]
    partitions: Sequence[str]
    seeds: Sequence[int]
    run: RunConfig  # what all cells have in common
    node: NodeConfig
    over: str
    jobs: int = 1  # runs at a time
    topologies: Sequence[str] = ()  # empty: as the run's options say
    cuts: Sequence[str] = ()  # empty: as the run's options say
    sweeps: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # values of further options

    @property
    def axes(self) -> dict[str, Sequence[Any]]:
        """The values of each option in which the cells differ."""
        return {
            "partition": self.partitions,
            "scheme": self.schemes,
            "topology": self.topologies or [self.run.topology],
            "cut": self.cuts or [self.run.cut],
            **self.sweeps,
        }

    @cached_property
    def combinations(self) -> list[tuple[RunConfig, Recipe | ConfigError]]:
        """All combinations, with why those are left out that cannot be."""
        axes = self.axes
        values = itertools.product(*axes.values())
        return [_resolved(replace(self.run, **dict(zip(axes, v, strict=True)))) for v in values]

    @cached_property
    def cells(self) -> dict[Cell, RunConfig]:
        """The cells, by partition, scheme, topology and cut, with the run of each."""
        found: dict[Cell, RunConfig] = {}
        for run, recipe in self.combinations:
            if isinstance(recipe, Recipe):
                swept = ", ".join(f"{name} {getattr(run, name)}" for name in self.sweeps)
                found.setdefault(Cell.of(recipe, swept), run)
        return found

    @property
    def runs(self) -> list[RunConfig]:
        """All runs, by partition, seed and the rest of the cell."""
        return [run for _, run in self.runs_of_cells]

    @property
    def runs_of_cells(self) -> list[tuple[Cell, RunConfig]]:
        """All runs, each with its cell."""
        of = itertools.product(self.partitions, self.seeds, self.cells.items())
        return [
            (cell, replace(run, seed=seed, run=self._name(cell, seed)))
            for partition, seed, (cell, run) in of
            if cell.partition == partition
        ]

    def _name(self, cell: Cell, seed: int) -> str:
        is_placed = (self.topologies or self.cuts) and cell.cut != NO_CUT
        placed = (cell.topology, cell.cut) if is_placed else ()
        swept = (cell.swept,) if self.sweeps else ()
        return run_name(cell.scheme, " ".join([cell.partition, *placed, *swept]), seed)

    def folder(self, run: RunConfig) -> Path:
        return self.node.out_path / "server" / run.run

    def in_own_folder(self) -> "Study":
        """Return the study in a folder for it alone: the same one for the same options."""
        node = self.node
        what = repr((self.axes, self.seeds, self.run, self.over, node.threads, node.device))
        digest = hashlib.sha256(what.encode()).hexdigest()[:8]
        name = re.sub("[^A-Za-z0-9.-]", "-", f"{self.run.model}-{self.run.dataset}-{digest}")
        out = node.out_path / "compare" / name
        return replace(self, node=replace(node, out=str(out)))

    def over_sockets(self, run: RunConfig) -> bool:
        """Say whether a cell is a run of real processes; ``central`` has no other side."""
        return self.over == "sockets" and run.scheme != "central"


def _resolved(run: RunConfig) -> tuple[RunConfig, Recipe | ConfigError]:
    try:
        return run, Recipe.of(run)
    except ConfigError as error:
        return run, error


def run_name(scheme: str, others: str, seed: int) -> str:
    """Return the name of a run; ``others``: its partition, and what else makes its cell.

    If they are long they are shortened, and told apart by a hash.
    """
    shown = re.sub("[^a-z0-9.]", "-", others)
    if len(shown) > MOST_SHOWN:
        digest = hashlib.sha256(others.encode()).hexdigest()[:8]
        shown = f"{shown[: MOST_SHOWN - 9]}-{digest}"
    return f"{scheme}-{shown}-{seed}"


def left_out(study: Study) -> list[str]:
    """Return a line for each reason why combinations are left out.

    Raises:
        ConfigError: a value of an axis fits none of the others.
    """
    refused = [(run, why) for run, why in study.combinations if isinstance(why, ConfigError)]
    used = [run for run, recipe in study.combinations if isinstance(recipe, Recipe)]
    for option, values in study.axes.items():
        for value in values:
            if all(getattr(run, option) != value for run in used):
                raise next(why for run, why in refused if getattr(run, option) == value)
    reasons = Counter(str(why) for _, why in refused)
    return [f"left out, {counted(n, 'combination')}: {why}" for why, n in reasons.items()]
