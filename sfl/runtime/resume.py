"""Load the state at a round's start from a run's folder, to resume the run or to replay it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import sfl.archive
from sfl.archive.checkpoint import Checkpoint, checkpoint_paths, valid_checkpoints
from sfl.archive.layout import (
    CLIENT_OPTIMIZER,
    MEMORY,
    ONE_CLIENT_MODEL,
    SERVER_OPTIMIZER,
    SHARED_MODEL,
    WITH_LINKS,
    segment_path,
)
from sfl.archive.round_log import read_figures, read_summary
from sfl.config import RunConfig
from sfl.errors import ConfigError, IntegrityError, RunError, counted
from sfl.files import strict_json
from sfl.files.regular_files import check_no_links, read_plain
from sfl.files.torch_file import StateSpec, decode_state
from sfl.model.segment import Segment
from sfl.model.topology import Holder, Segments
from sfl.options import check_goes_on
from sfl.strategy.early_stopping import RoundsSeen
from sfl.strategy.merge import Shared, has_client_state, memory_spec
from sfl.strategy.ranks import OneRank, Ranks
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Fronts
from sfl.strategy.split_model import SplitModel


class Files(Protocol):
    """Checked files of a run's folder: all recorded ones, or those of a checkpoint."""

    @property
    def root(self) -> Path: ...

    def lists(self, path: str) -> bool: ...

    def read(self, path: str) -> bytes: ...

    def state(self, path: str, spec: StateSpec) -> dict[str, Tensor]: ...


def read_shared(files: Files, split: SplitModel, round_index: int) -> dict[str, Shared]:
    """Return the shared weights at a round's start, of the segments stored in this folder.

    Raises:
        IntegrityError: one of the files is damaged or missing.
    """
    shared, last = {}, round_index - 1
    own = split.recipe.scheme.fronts is Fronts.OWN and round_index > 0
    for name, spec in split.specs.items():
        # A run's folder lists its first weights (-1), a checkpoint only those of its own round.
        lies_here = any(files.lists(segment_path(SHARED_MODEL, name, r)) for r in (-1, last))
        if not lies_here or (own and split.recipe.segments[name] is Holder.CLIENT):
            continue
        state = files.state(segment_path(SHARED_MODEL, name, last), spec)
        path, memory = segment_path(MEMORY, name, last), {}
        if files.lists(path):
            memory = files.state(path, memory_spec(split.recipe, spec, split.entries))
        shared[name] = Shared(state, memory)
    return shared


def load_backs(
    files: Files,
    run: RunConfig,
    backs: Mapping[int, Segments],
    shared: Mapping[str, Shared],
    round_index: int,
) -> None:
    """Load the server's copies of its segments as at a round's start.

    Raises:
        IntegrityError: one of the files is damaged or missing.
    """
    for b, copy in backs.items():
        for name, segment in copy.items():
            if name not in shared:
                raise IntegrityError(f"{files.root}: has no weights of the {name}")
            segment.load(shared[name].state)
            segment.optimizer.reset()
            if run.optimizer_state == "keep" and round_index > 0:
                path = segment_path(SERVER_OPTIMIZER, name, round_index - 1, back=b)
                _load_optimizer(files, segment, path)


def load_own_state(
    folder: Path, segments: Segments, recipe: Recipe, client: int, round_index: int
) -> None:
    """Load a client's own state, fronts and optimisers, as at a round's start.

    Raises:
        RunError: its checkpoint is missing or damaged.
    """
    if not has_client_state(recipe) or round_index == 0:
        return
    damage: list[str] = []
    for checkpoint in valid_checkpoints(folder, recipe.run, damage):
        if checkpoint.round == round_index:
            _load_kept(checkpoint, segments, recipe, client)
            return
    why = f" ({'; '.join(damage)})" if damage else ""
    raise RunError(
        f"{folder} lacks what only client_{client} has of round {round_index + 1}{why}: start it"
        " where it ran before, with the same --out"
    )


def _load_kept(checkpoint: Checkpoint, segments: Segments, recipe: Recipe, client: int) -> None:
    last = checkpoint.round - 1
    for name, segment in segments.items():
        if recipe.scheme.fronts is Fronts.OWN:
            path = segment_path(ONE_CLIENT_MODEL, name, last, client=client)
            segment.load(checkpoint.state(path, segment.spec))
        if recipe.training.keeps_optimizer:
            path = segment_path(CLIENT_OPTIMIZER, name, last, client=client)
            _load_optimizer(checkpoint, segment, path)


def _load_optimizer(files: Files, segment: Segment, path: str) -> None:
    """Load an optimiser's saved state, which is empty before its first step."""
    data, spec = files.read(path), segment.optimizer.spec()
    state = decode_state(data, spec, str(files.root / path), or_empty=True)
    segment.optimizer.load(state)


def check_same_run(folder: Path, run: RunConfig) -> None:
    """Check that a client's folder, unless empty, belongs to the run that the server resumes.

    Raises:
        RunError: it belongs to another run of that name.
    """
    try:
        recorded = strict_json.loads(read_plain(folder / "config.json"))
        check_goes_on(recorded, asdict(run) | {"keep_tensors": recorded["keep_tensors"]})
    except FileNotFoundError:  # the client was killed before it wrote its options
        return
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is of another run: {error}") from error


@dataclass(frozen=True)
class Past:
    """The recorded state of a run that is resumed."""

    checkpoints: Sequence[Checkpoint]  # usable ones, the newest first
    damage: Sequence[str]  # why newer ones cannot be used

    @property
    def first_round(self) -> int:
        """The round that the run resumes with."""
        return self.checkpoints[0].round

    @property
    def files(self) -> Checkpoint:
        return self.checkpoints[0]

    @property
    def data(self) -> Mapping[str, Any]:
        """The record of the clients' data."""
        described: Mapping[str, Any] = self.files.about["data"]
        return described

    @property
    def num_samples(self) -> Mapping[int, Mapping[str, int]]:
        return {int(k): parts for k, parts in self.data["num_samples"].items()}

    @property
    def digests(self) -> Mapping[int, str]:
        return {int(k): digest for k, digest in self.data["digests"].items()}

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The server's fingerprint."""
        theirs: Mapping[str, str] = self.files.about["fingerprint"]
        return theirs

    @property
    def client_fingerprints(self) -> Mapping[int, Mapping[str, str]]:
        """The clients' fingerprints."""
        return {int(k): theirs for k, theirs in self.files.about.get("clients", {}).items()}

    @property
    def own_rounds(self) -> Mapping[int, int]:
        """For each client, the round whose start its own state belongs to."""
        return own_rounds(self.files)

    def matches_own_state(self, client: int, rounds: Collection[int]) -> bool:
        """Return whether a client's own state, kept for ``rounds``, fits any of the checkpoints."""
        wanted = {own_rounds(checkpoint).get(client, 0) for checkpoint in self.checkpoints}
        return not rounds or not wanted.isdisjoint(rounds)

    @property
    def clients(self) -> int:
        return len(self.num_samples)

    def seen(self, recipe: Recipe) -> RoundsSeen:
        """Return what the run's rounds so far mean for those that follow."""
        seen = RoundsSeen(recipe)
        for row in read_summary((self.files.root / "rounds.csv").read_bytes()):
            if (round_index := int(row["round"])) < self.first_round:
                seen.see(round_index, read_figures(row, recipe.task.compared))
        return seen

    def is_over(self, recipe: Recipe) -> bool:
        """Return whether no round is left."""
        return self.seen(recipe).is_over(self.first_round)

    def only(self, rounds: Collection[int]) -> "Past":
        """Keep only the checkpoints of these rounds, of which there is one."""
        return replace(self, checkpoints=[c for c in self.checkpoints if c.round in rounds])

    def at(self, round_index: int) -> "Past":
        """Keep only this round's checkpoint.

        Raises:
            RunError: there is no checkpoint of it.
        """
        left = self.only([round_index])
        if not left.checkpoints:
            there = ", ".join(str(c.round + 1) for c in self.checkpoints)
            raise RunError(
                f"{self.files.root} can go on with round {there}, the others with {round_index + 1}"
            )
        return left

    def common_to_all(
        self, rounds: Mapping[int, Collection[int]], ranks: Ranks | None = None
    ) -> "Past":
        """Keep only the checkpoint of the newest round that all clients of all ranks can start.

        ``rounds``: the rounds whose own state each client has; empty: it needs none.

        Raises:
            RunError: there is no such round.
        """
        possible = {
            k: [c.round for c in self.checkpoints if not has or own_rounds(c).get(k, 0) in has]
            for k, has in rounds.items()
        }
        of_all = (ranks or OneRank()).gather(possible)
        left = set(c.round for c in self.checkpoints).intersection(*of_all.values())
        if left:
            return self.at(max(left))
        ours = ", ".join(str(c.round + 1) for c in self.checkpoints)
        has = {k: ", ".join(str(n + 1) for n in r) for k, r in rounds.items() if r}
        theirs = "; ".join(f"client_{k} {of_client}" for k, of_client in has.items())
        raise RunError(
            f"no round that all have what it starts from: the server has that of {ours}; {theirs}"
        )


def own_rounds(checkpoint: Checkpoint) -> Mapping[int, int]:
    """Return for each client the round whose start its own state belongs to, as recorded."""
    return {int(k): r for k, r in checkpoint.about.get("own", {}).items()}


def has_begun(folder: Path) -> bool:
    """Return whether a run has written a checkpoint."""
    return bool(checkpoint_paths(folder))


def open_past(folder: Path, run: RunConfig) -> Past:
    """Read the checkpoints of a run that is to be resumed.

    Raises:
        RunError: the run has not begun, or has another configuration.
        IntegrityError: no checkpoint is complete and undamaged.
    """
    try:
        check_no_links(folder, apart=folder / WITH_LINKS)
    except OSError as error:
        raise RunError(f"cannot go on in {folder}: {error.filename}: {error.strerror}") from error
    if not checkpoint_paths(folder):
        raise RunError(f"the run in {folder} has not begun")
    damage: list[str] = []
    checkpoints = []
    for checkpoint in valid_checkpoints(folder, run, damage):
        if {"data", "fingerprint"} <= checkpoint.about.keys():
            checkpoints.append(checkpoint)
        else:
            damage.append(
                f"{checkpoint.root}: the checkpoint of round {checkpoint.round + 1} is no server's"
            )
    if not checkpoints:
        raise IntegrityError(f"nothing to go on from is whole: {'; '.join(damage)}")
    return Past(checkpoints, damage)


def why_finished(past: Past, recipe: Recipe) -> str:
    """Return how a run has ended; "" if it has rounds left, or may not have told its clients."""
    folder, done, rounds = past.files.root, past.first_round, recipe.run.rounds
    finished = any(entry.kind == "summary" for entry in sfl.archive.open(folder).listed)
    seen = past.seen(recipe)
    if finished and seen.why_stopped:
        return (
            f"the run in {folder} has stopped after {counted(done, 'round')} of its own accord:"
            f" {seen.why_stopped}"
        )
    if rounds < done or (seen.is_over(done) and finished):
        return (
            f"the run in {folder} has done its {counted(done, 'round')};"
            " say with --rounds how many it shall have in all"
        )
    return ""


def own_state_rounds(folder: Path, run: RunConfig) -> tuple[int, ...]:
    """Return the rounds whose own state a client has complete on disk; always 0, which needs none.

    Raises:
        RunError: a checkpoint belongs to another run of that name.
    """
    return *(checkpoint.round for checkpoint in valid_checkpoints(folder, run, [])), 0
