"""Going on with a run that lies on disk: what a round starts from, read back.

Resuming and replay both begin a round with what the one before wrote down.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import sfl.archive
from sfl.archive import MANIFEST, ROUND_LOG, RunArchive
from sfl.config import RunConfig, counted
from sfl.errors import ConfigError, RunError
from sfl.options import check_goes_on
from sfl.outcome import (
    BACK,
    CLIENT_MODEL,
    CLIENT_OPTIMIZER,
    FRONT,
    MEMORY,
    ONE_CLIENT_MODEL,
    SERVER_MODEL,
    SERVER_OPTIMIZER,
    Half,
    has_back_files,
    memory_spec,
    model_path,
)
from sfl.schemes import Fronts, scheme
from sfl.segment import Segment
from sfl.split_model import SplitModel
from sfl.tensors import decode_state


def read_halves(
    archive: RunArchive, run: RunConfig, split: SplitModel, round_index: int
) -> dict[str, Half]:
    """Return the halves that everyone started a round from, of those that there are.

    Raises:
        IntegrityError: a file of theirs is damaged or missing.
    """
    files = {}
    fronts_lie_here = archive.lists(model_path(CLIENT_MODEL, -1))  # not with a main server alone
    if fronts_lie_here and (round_index == 0 or scheme(run.scheme).fronts is not Fronts.OWN):
        files[FRONT] = CLIENT_MODEL, split.front_spec
    if has_back_files(run) and archive.lists(model_path(SERVER_MODEL, -1)):
        files[BACK] = SERVER_MODEL, split.back_spec
    halves = {}
    for name, (template, spec) in files.items():
        state = archive.state(model_path(template, round_index - 1), spec)
        path, memory = model_path(MEMORY, round_index - 1, half=name), {}
        if round_index > 0 and archive.lists(path):
            memory = archive.state(path, memory_spec(run, spec, split.parameter_names))
        halves[name] = Half(state, memory)
    return halves


def load_backs(
    archive: RunArchive,
    run: RunConfig,
    backs: Mapping[int, Segment],
    halves: Mapping[str, Half],
    round_index: int,
) -> None:
    """Bring the server's copies to where they were when a round began.

    Raises:
        IntegrityError: a file of theirs is damaged or missing.
    """
    start = halves.get(BACK) or halves[FRONT]
    for b, back in backs.items():
        back.load(start.state)
        if run.optimizer_state == "keep" and round_index > 0:
            _load_optimizer(archive, back, model_path(SERVER_OPTIMIZER, round_index - 1, back=b))


def load_front(folder: Path, front: Segment, run: RunConfig, client: int, first_round: int) -> None:
    """Bring a client's front and optimiser to where its own folder has them.

    Raises:
        RunError: the folder does not have what only this client had.
        IntegrityError: a file of theirs is damaged or missing.
    """
    last = first_round - 1
    front_path = model_path(ONE_CLIENT_MODEL, last, client=client)
    optimizer_path = model_path(CLIENT_OPTIMIZER, last, client=client)
    keeps_front, keeps_optimizer = (
        scheme(run.scheme).fronts is Fronts.OWN,
        run.optimizer_state == "keep",
    )
    if not keeps_front and not keeps_optimizer:
        return
    archive = sfl.archive.open(folder)
    for path, wanted in ((front_path, keeps_front), (optimizer_path, keeps_optimizer)):
        if wanted and not archive.lists(path):
            raise RunError(
                f"{folder} lacks {path}, which only client_{client} has: start it where it ran"
                " before, with the same --out"
            )
    if keeps_front:
        front.load(archive.state(front_path, front.spec))
    if keeps_optimizer:
        _load_optimizer(archive, front, optimizer_path)


def _load_optimizer(archive: RunArchive, segment: Segment, path: str) -> None:
    """Load what was kept of an optimiser; nothing is in it if that had taken no step."""
    data, spec = archive.read(path), segment.optimizer_spec()
    state = decode_state(data, spec, str(archive.root / path), or_empty=True)
    segment.load_optimizer_state(state)


def check_same_run(folder: Path, run: RunConfig) -> None:
    """See that a client's folder, if anything lies in it, is of the run that a server goes on with.

    Raises:
        RunError: it is of another run of that name.
        IntegrityError: its records are damaged.
    """
    if not (folder / MANIFEST).exists():
        return
    recorded = sfl.archive.open(folder).config()
    try:
        check_goes_on(recorded, asdict(run) | {"keep_tensors": recorded["keep_tensors"]})
    except ConfigError as error:
        raise RunError(f"{folder} is of another run: {error}") from error


@dataclass(frozen=True)
class Past:
    """What a run did before it goes on."""

    archive: RunArchive
    first_round: int  # that it goes on with
    done: int  # rounds
    num_samples: Mapping[int, Mapping[str, int]]  # of each client
    digests: Mapping[int, str]  # of each client's data
    fingerprint: Mapping[str, str]  # of what it ran on

    @property
    def clients(self) -> int:
        return len(self.num_samples)


def open_past(folder: Path, run: RunConfig, first_round: int | None = None) -> Past:
    """Return how far a run got; ``first_round`` is the one to go on with, if somebody else says.

    Raises:
        RunError: the folder is none of a run that started.
        IntegrityError: its records are damaged.
        ConfigError: there is nothing left to do.
    """
    archive = sfl.archive.open(folder)
    rounds = [entry.round for entry in archive.listed if entry.kind == ROUND_LOG]
    done = max(rounds, default=-1) + 1
    if not archive.lists("environment.json"):
        raise RunError(f"the run in {folder} never started; start it again under another --run")
    if first_round is None and run.rounds <= done:
        raise ConfigError(
            f"the run in {folder} has done its {counted(done, 'round')};"
            " say with --rounds how many it shall have in all"
        )
    if first_round is not None and first_round > done:
        raise RunError(f"{folder} has {counted(done, 'round')}, the run {first_round}")
    environment = archive.environment()
    counts = environment["data"]["num_samples"]
    samples = {int(k): parts for k, parts in counts.items()}
    digests = {int(k): digest for k, digest in environment["data"]["digests"].items()}
    first_round = done if first_round is None else first_round
    return Past(archive, first_round, done, samples, digests, environment["fingerprint"])


def drop_partial_rounds(past: Past) -> None:
    """Remove the tensors of a round that did not end: it is done again."""
    for folder in past.archive.folders():
        if int(folder.name.removeprefix("round_")) >= past.first_round:
            shutil.rmtree(folder)


def check_same_data(past: Past, digests: Mapping[int, str]) -> None:
    """See that the clients have the data that they had before.

    Raises:
        RunError: a client has others.
    """
    for k, before in past.digests.items():
        if before != digests[k]:
            raise RunError(
                f"client_{k} has other data than it had in this run; give each client the"
                " --client-id and the --data-dir that it had"
            )
