"""Open a recorded run to compute with its model and tensors."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sfl.archive
from sfl.archive.layout import ONE_CLIENT_MODEL, SHARED_MODEL, round_of_folder, segment_path
from sfl.archive.manifest import ROUND_LOG
from sfl.archive.reader import RunArchive
from sfl.archive.records import data_of, ranks_of, texts_of
from sfl.config import RunConfig
from sfl.conversation.party import TRAIN
from sfl.environment import differences, fingerprint, set_up_torch
from sfl.errors import ConfigError, IntegrityError
from sfl.model.topology import Holder, Segments
from sfl.nodes import NodeConfig
from sfl.options import from_values, names_of
from sfl.runtime.resume import load_backs, read_shared
from sfl.strategy.merge import Shared, averaging_weights
from sfl.strategy.order import draw
from sfl.strategy.ranks import block
from sfl.strategy.recipe import MAIN_ROLES, Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.trusted_imports import remembered

MAX_ROUNDS = 1_000_000  # bounds the loops over a recorded run's rounds


class RecordedRun:
    """A run's folder with its recipe, model and data description.

    ``differences``: lines that name what in this process may change the last bit of results.

    Raises:
        IntegrityError: the configuration is damaged.
        ConfigError: the model is a user's own that is not ``allowed``, or cannot be imported.
    """

    def __init__(
        self,
        archive: RunArchive,
        device: torch.device,
        allowed: Collection[str],
        differences: Sequence[str] = (),
    ) -> None:
        self.archive = archive
        self.device = device
        self.allowed = allowed
        self.differences = differences
        run = config_of(archive)
        self.data = data = data_record(archive)
        role = str(archive.config().get("role", MAIN_ROLES[0]))
        recipe = Recipe.of(run, allowed)
        try:
            self.holder, self.recipe = recipe.in_role(role)
        except ConfigError as error:
            raise IntegrityError(f"{archive.root / 'config.json'}: {error}") from error
        self.leads = role in MAIN_ROLES  # else it has followed the main server
        # A further task's server: its back and outputs are in files of the main server's names.
        self.is_of_task = self.holder is Holder.SERVER and not self.leads
        self.run = self.recipe.run
        self.split = SplitModel.of_data(self.recipe, data)
        self.num_train = {int(k): parts[TRAIN] for k, parts in data["num_samples"].items()}
        self.clients = _clients_here(archive, sorted(self.num_train))
        self.scheme = self.recipe.scheme
        is_fed = role == "fed"  # a fed server sees no steps
        self.exchange = Exchange.NOTHING if is_fed else self.scheme.exchange
        if self.run.rounds > MAX_ROUNDS:
            raise IntegrityError(
                f"{archive.root}: is of {self.run.rounds} rounds; we read {MAX_ROUNDS}"
            )
        self._check_clients()
        # A main server with a separate fed server has none of the clients' segments.
        first = {name: segment_path(SHARED_MODEL, name, -1) for name in self.split.specs}
        self.segments = [name for name, path in first.items() if archive.was_listed(path)]

    def _check_clients(self) -> None:
        found = {place[0] for f in self.archive.folders() if (place := round_of_folder(f))}
        found |= {k for entry in self.archive.listed for k in entry.clients}
        if unknown := found - self.num_train.keys():
            raise IntegrityError(
                f"{self.archive.root}: has files of client {min(unknown)}, who is none"
            )

    @property
    def is_whole(self) -> bool:
        """Whether the files of all clients are here, and not those of some ranks alone."""
        return len(self.clients) == len(self.num_train)

    def ended(self, round_index: int) -> bool:
        """Return whether a round was completed."""
        return self.archive.lists(f"rounds/round_{round_index:03d}.csv")

    @property
    def num_finished(self) -> int:
        """How many rounds were completed."""
        return sum(map(self.ended, range(self.run.rounds)))

    def has_models(self, round_index: int) -> bool:
        """Return whether the weights at a round's start and end were kept."""
        return self.archive.rounds_without_models.isdisjoint((round_index - 1, round_index))

    def order(self, round_index: int) -> list[int]:
        """Return a round's clients in training order; of an unfinished round, those drawn."""
        for entry in self.archive.listed:
            if entry.kind == ROUND_LOG and entry.round == round_index:
                return list(entry.clients)
        return draw(self.run, sorted(self.num_train), round_index)

    def weights(self, round_index: int) -> dict[int, int]:
        """Return each participating client's weight in the averages."""
        took_part = sorted(self.order(round_index))
        return averaging_weights(self.run, {k: self.num_train[k] for k in took_part})

    def shared_at(self, round_index: int) -> Mapping[str, Shared]:
        """Return the shared weights at a round's start, by segment."""
        return read_shared(self.archive, self.split, round_index)

    def trained_states(self, round_index: int) -> dict[int, dict[str, dict[str, Tensor]]]:
        """Return the weights that each client sent at the end of a round, by segment."""
        ours = [n for n in self.segments if self.recipe.segments[n] is Holder.CLIENT]
        states: dict[int, dict[str, dict[str, Tensor]]] = {}
        for k in self.order(round_index):
            paths = {n: segment_path(ONE_CLIENT_MODEL, n, round_index, client=k) for n in ours}
            states[k] = {n: self.archive.state(p, self.split.specs[n]) for n, p in paths.items()}
        return states

    def backs_at(self, round_index: int) -> dict[int, Segments]:
        """Return the server's copies of its segments as at a round's start."""
        indices = self.scheme.backs_of(self.clients)
        backs = {b: self.split.segments(self.holder, self.device) for b in indices}
        load_backs(self.archive, self.run, backs, self.shared_at(round_index), round_index)
        for back in backs.values():
            back.start_round(round_index)
        return backs


def _clients_here(archive: RunArchive, clients: list[int]) -> list[int]:
    """Return the clients whose files an archive has: of its rank, and of those that lie in it."""
    shares = [_read_environment(share, "ranks", ranks_of) for share in (archive, *archive.shares)]
    return sorted({k for share in shares for k in block(clients, share["rank"], share["size"])})


def config_of(archive: RunArchive) -> RunConfig:
    """Return the options of a recorded run, checked."""
    options = {n: v for n, v in archive.config().items() if n in names_of(RunConfig)}
    return from_values(RunConfig, options, str(archive.root / "config.json"))


def data_record(archive: RunArchive) -> dict[str, Any]:
    """Return what a recorded run knows of its clients' data, checked."""
    return _read_environment(archive, "data", data_of)


def _read_environment(
    archive: RunArchive, name: str, read: Callable[[object], dict[str, Any]]
) -> dict[str, Any]:
    """Return one part of environment.json, checked by ``read``."""
    try:
        return read(archive.environment().get(name))
    except ValueError as error:
        raise IntegrityError(f"{archive.root / 'environment.json'}: {error}") from error


def load(
    run_dir: str | Path | RunArchive,
    device: str | None = None,
    threads: int | None = None,
    allow_import: str = "",
) -> RecordedRun:
    """Open a run, or take an open one, to compute with; set up torch in this process as it did.

    The run may come from another machine: its own model is imported only if ``allow_import`` lists
    it, or a command line of this machine has named it before.

    Raises:
        RunError: there is no run.
        IntegrityError: its configuration is damaged.
        ConfigError: the device is not available, or the run's model may not be imported.
    """
    archive = run_dir if isinstance(run_dir, RunArchive) else sfl.archive.open(run_dir)
    theirs = _read_environment(archive, "fingerprint", texts_of)
    of_run = theirs.get("device", "").partition(":")[0]
    threads_text = theirs.get("threads", "")
    at_most = os.cpu_count() or 1
    used = min(int(threads_text), at_most) if re.fullmatch(r"[1-9]\d{0,3}", threads_text) else 1
    node = NodeConfig(device=device or of_run, threads=threads or used, allow_import=allow_import)
    node.check()
    found = set_up_torch(node)
    different = differences(theirs, fingerprint(found))
    return RecordedRun(archive, found, node.allowed_imports | remembered(), different)
