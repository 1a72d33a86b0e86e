"""A recorded run, opened to compute with it."""

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sfl.archive.reader import RunArchive
    from sfl.model.segment import Segment
    from sfl.strategy.merge import Half


MAX_ROUNDS = 1_000_000  # of a run, each of which is looked for


class RecordedRun:
    """A run's folder, with what is needed to compute with it.

    Raises:
        IntegrityError: its configuration is damaged.
        ConfigError: its model is a user's own that is not ``allowed``, or cannot be imported.
    """

    def __init__(
        self, archive: "RunArchive", device: "torch.device", allowed: Collection[str]
    ) -> None:
        from sfl.archive.layout import CLIENT_MODEL, model_path, round_of_folder
        from sfl.archive.records import data_of
        from sfl.config import RunConfig
        from sfl.conversation.party import TRAIN
        from sfl.errors import IntegrityError
        from sfl.options import from_values, names_of
        from sfl.strategy.recipe import Recipe
        from sfl.strategy.schemes import Exchange
        from sfl.strategy.split_model import SplitModel

        self.archive = archive
        self.device = device
        self.allowed = allowed
        options = {n: v for n, v in archive.config().items() if n in names_of(RunConfig)}
        run = from_values(RunConfig, options, str(archive.root / "config.json"))
        self.recipe = Recipe.of(run, allowed)
        self.run = self.recipe.run
        data = read_environment(archive, "data", data_of)
        self.split = SplitModel.of_data(self.recipe, data)
        self.num_train = {int(k): parts[TRAIN] for k, parts in data["num_samples"].items()}
        self.scheme = self.recipe.scheme
        is_fed = archive.config().get("role") == "fed"  # then no step passed here
        self.exchange = Exchange.NOTHING if is_fed else self.scheme.exchange
        if self.run.rounds > MAX_ROUNDS:
            raise IntegrityError(
                f"{archive.root}: is of {self.run.rounds} rounds; we read {MAX_ROUNDS}"
            )
        recorded = {round_of_folder(folder) for folder in archive.folders()}
        who = {place[0] for place in recorded if place} | {
            k for e in archive.listed for k in e.clients
        }
        if strangers := who - self.num_train.keys():
            raise IntegrityError(
                f"{archive.root}: has files of client {min(strangers)}, who is none"
            )
        # A main server whose fed server is apart has none.
        self.has_fronts = archive.has_listed(model_path(CLIENT_MODEL, -1))

    @property
    def clients(self) -> list[int]:
        return sorted(self.num_train)

    def ended(self, round_index: int) -> bool:
        """Say whether a round came to its end."""
        return self.archive.lists(f"rounds/round_{round_index:03d}.csv")

    def has_models(self, round_index: int) -> bool:
        """Say whether what a round started from and what it gave were to stay."""
        return self.archive.rounds_without_models.isdisjoint((round_index - 1, round_index))

    def order(self, round_index: int) -> list[int]:
        """Return who took part in a round, in the round's order; of one that did not end, who was
        to.
        """
        from sfl.archive.manifest import ROUND_LOG
        from sfl.strategy.order import draw

        for entry in self.archive.listed:
            if entry.kind == ROUND_LOG and entry.round == round_index:
                return list(entry.clients)
        return draw(self.run, self.clients, round_index)

    def weights(self, round_index: int) -> dict[int, int]:
        """Return the weight in the averages of each client that took part."""
        from sfl.strategy.merge import averaging_weights

        took_part = sorted(self.order(round_index))
        return averaging_weights(self.run, {k: self.num_train[k] for k in took_part})

    def halves_at(self, round_index: int) -> "Mapping[str, Half]":
        """Return the halves that everyone started a round from."""
        from sfl.runtime.resume import read_halves

        return read_halves(self.archive, self.split, round_index)

    def backs_at(self, round_index: int) -> "dict[int, Segment]":
        """Return the server's copies of its model as they were when a round began."""
        from sfl.runtime.resume import load_backs

        backs = {b: self.split.back(self.device) for b in map(self.scheme.back_of, self.clients)}
        load_backs(self.archive, self.run, backs, self.halves_at(round_index), round_index)
        for back in backs.values():
            back.start_round(round_index)
        return backs


def read_environment(
    archive: "RunArchive", name: str, read: "Callable[[object], dict[str, Any]]"
) -> dict[str, "Any"]:
    """Return a part of what is recorded of a run's machines and data, of the types it must have.

    Raises:
        IntegrityError: it is of others.
    """
    from sfl.errors import IntegrityError

    try:
        return read(archive.environment().get(name))
    except ValueError as error:
        raise IntegrityError(f"{archive.root / 'environment.json'}: {error}") from error


def load(
    run_dir: str | Path,
    device: str | None = None,
    threads: int | None = None,
    allow_import: str = "",
) -> RecordedRun:
    """Open a run to compute with it, and warn if this process may compute other last bits.

    The run may be somebody else's: it imports what ``allow_import`` lists, and what a command line
    of this machine has named before.
    """
    from sfl.archive import reader as archive
    from sfl.archive.records import texts_of
    from sfl.environment import differences, fingerprint, set_up_torch
    from sfl.nodes import NodeConfig
    from sfl.own_functions import remembered

    opened = archive.open(run_dir)
    theirs = read_environment(opened, "fingerprint", texts_of)
    of_run = theirs.get("device", "").partition(":")[0]
    told = theirs.get("threads", "")
    at_most = os.cpu_count() or 1
    used = min(int(told), at_most) if re.fullmatch(r"[1-9]\d{0,3}", told) else 1
    node = NodeConfig(device=device or of_run, threads=threads or used, allow_import=allow_import)
    node.check()
    found = set_up_torch(node)
    for difference in differences(theirs, fingerprint(found)):
        print(f"warning: here {difference} of the run: the last bit may differ", file=sys.stderr)
    return RecordedRun(opened, found, node.allowed_imports | remembered())
