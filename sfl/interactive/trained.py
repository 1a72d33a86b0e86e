"""The trained model of a run: its segments, found wherever on this machine they lie, and joined."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

import sfl.archive
from sfl.archive.layout import MANIFEST, ONE_CLIENT_MODEL, SHARED_MODEL, segment_path
from sfl.archive.reader import RunArchive
from sfl.errors import RunError, counted
from sfl.files.torch_file import StateSpec
from sfl.model.fusion import pack
from sfl.model.topology import FRONT, Holder
from sfl.runtime.recorded_run import RecordedRun
from sfl.strategy.schemes import Fronts


def by_run(runs: Sequence[RunArchive], folders: Sequence[Path]) -> list[list[Path]]:
    """Return which of these folders of clients belong to each run.

    Raises:
        RunError: one belongs to none of the runs, or is no folder of a run.
    """
    owners = {
        folder: [_is_of(folder, run, is_only=len(runs) == 1) for run in runs] for folder in folders
    }
    for folder, found in owners.items():
        if not any(found):
            raise RunError(
                f"{folder} is no client's folder of {', '.join(str(run.root) for run in runs)}:"
                " their --run or --seed differs; give the folders of these runs' clients"
            )
    return [[f for f, found in owners.items() if found[k]] for k in range(len(runs))]


def _is_of(folder: Path, run: RunArchive, *, is_only: bool) -> bool:
    """Return whether a client's folder is of a run; ``is_only``: no other run is asked for."""
    theirs, ours = sfl.archive.open(folder), run.config()
    if not theirs.lists("config.json"):  # of a simulation: <out>/client/<run>/client_<k>
        place = folder.resolve()
        is_renamed = re.fullmatch(r"client_\d+", place.name) is None
        return place.parent.name == ours.get("run") or (is_only and is_renamed)
    said = theirs.config()
    return all(said.get(name) == ours.get(name) for name in ("run", "seed"))


class Holders:
    """The folders of a run on this machine: its own, the clients', hops', and other servers'."""

    def __init__(self, archive: RunArchive, clients: Sequence[Path]) -> None:
        """``clients``: folders that were brought here.

        Raises:
            RunError: one is no folder of this run.
        """
        (brought,) = by_run([archive], clients)
        root = archive.root.resolve()
        out, name = root.parent.parent, root.name
        beside = sorted((out / "client" / name).glob("client_*"))
        servers = [*sorted(out.glob(f"hop_*/{name}")), out / "fed" / name, out / "server" / name]
        others = (*brought, *beside, *(path for path in servers if path != root))
        self.archive = archive
        self._places = f"{out / 'client' / name}/client_<k>", out / "fed" / name
        self._archives = [
            archive, *(sfl.archive.open(f) for f in others if (f / MANIFEST).is_file())
        ]  # fmt: skip

    def has(self, path: str, *, is_own: bool = False) -> bool:
        """Return whether one of the folders has a file; ``is_own``: the run's own folder."""
        return any(archive.lists(path) for archive in self._among(is_own))

    def state(
        self, path: str, spec: StateSpec, client: int | None, *, is_own: bool = False
    ) -> dict[str, Tensor]:
        """Return the tensors of a file, by its path in whichever folder lists it.

        ``client``: whose folder it lies in if the server has none of it; None: nobody's.
        ``is_own``: it lies in the run's own folder; in that of another server it is another file.

        Raises:
            RunError: no folder has it.
        """
        for archive in self._among(is_own):
            if archive.lists(path):
                return archive.state(path, spec)
        if any(archive.was_listed(path) for archive in self._among(is_own)):
            raise RunError(f"{self.archive.root}: {path} was removed, as --keep-models asks")
        of_clients, of_fed = self._places
        if client is None:
            raise RunError(
                f"{self.archive.root} has no {path}, nor has {of_fed} or another of these folders:"
                " bring that of the fed server there, of the main server or of the hop, or give a"
                " round that the run has finished"
            )
        raise RunError(
            f"{self.archive.root} has no {path}: it lies at client_{client}, in the folder"
            f" <out>/client/{self.archive.root.resolve().name}/client_{client} of its machine."
            f" Looked in {of_clients}; bring that folder here and give it, with --clients FOLDER or"
            " sfl.open_run(..., clients=[FOLDER])"
        )

    def _among(self, is_own: bool) -> list[RunArchive]:
        return self._archives[:1] if is_own else self._archives


class VerticalModel(nn.Module):
    """The clients' fronts, and what follows at hops and server, which joins their activations.

    Takes one tensor for each client, in the order of their ids.
    """

    def __init__(self, fronts: Sequence[nn.Module], back: nn.Module) -> None:
        super().__init__()
        self.fronts, self.back = nn.ModuleList(fronts), back

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the outputs (B, classes) for each client's part of the samples."""
        z = pack([front(x) for front, x in zip(self.fronts, parts, strict=True)])
        outputs: Tensor = self.back(z)
        return outputs


class Trained:
    """The segments of a run's model after each round."""

    def __init__(self, recorded: RecordedRun, holders: Holders) -> None:
        self._recorded, self._holders = recorded, holders

    def last(self, round_index: int | None) -> int:
        """Return the round, or the last finished one if it is None.

        Raises:
            RunError: no round is finished, or there is no such round.
        """
        recorded = self._recorded
        done = recorded.num_finished
        if round_index is not None and not -1 <= round_index < done:
            raise RunError(
                f"round {round_index}: {recorded.archive.root} has finished"
                f" {counted(done, 'round')}, from 0; -1 is before the first"
            )
        if not done and round_index is None:
            raise RunError(
                f"{recorded.archive.root} has not finished a round; -1 is before the first"
            )
        return done - 1 if round_index is None else round_index

    def segment(self, name: str, round_index: int | None, client: int | None) -> nn.Sequential:
        """Return one segment with its weights after a round; see ``Run.segment``."""
        recorded, last = self._recorded, self.last(round_index)
        holder = self._holder_of(name)
        of_client = holder is Holder.CLIENT
        whose = client if of_client else None
        if whose is not None and whose not in recorded.clients:
            raise RunError(f"{recorded.archive.root} has no client_{whose}")
        if of_client and whose is None and recorded.scheme.fronts is Fronts.OWN:
            known = ", ".join(map(str, recorded.clients))
            raise RunError(
                f"{recorded.archive.root}: each client keeps a {name} of its own: say whose, with"
                f" client= or --client, of {known}"
            )
        split = recorded.split if whose is None else recorded.split.of_party(whose)
        blocks = split.blocks(name)
        # Before the first round all start from the same, unless clients have models of their own.
        one_client = None if last < 0 and not recorded.recipe.joins else whose
        path = segment_path(SHARED_MODEL, name, last)
        if one_client is not None:
            path = segment_path(ONE_CLIENT_MODEL, name, last, client=one_client)
        from_others = recorded.run.init_checksum and one_client is None
        own = recorded.is_of_task and holder is recorded.holder
        if last >= 0 or from_others or self._holders.has(path, is_own=own):  # else by the seed
            state = self._holders.state(path, split.specs[name], whose, is_own=own)
            blocks.load_state_dict(state)
        return blocks.eval()

    def _holder_of(self, name: str) -> Holder:
        recorded = self._recorded
        held = recorded.recipe.segments
        if name not in recorded.split.specs:
            raise RunError(
                f"{recorded.archive.root}: --scheme {recorded.run.scheme} with this model has no"
                f" segment {name}; it has {', '.join(recorded.split.specs)}"
            )
        return held[name]

    def model(self, round_index: int | None, client: int | None) -> nn.Module:
        """Return all segments joined; see ``Run.model``."""
        recorded = self._recorded
        if recorded.recipe.joins and client is not None:
            raise RunError(
                f"{recorded.archive.root}: the model has the fronts of all clients: leave out"
                f" client={client}, or take this client's front by segment() or front()"
            )
        names = [*recorded.split.specs]
        if recorded.recipe.joins:
            fronts = [self.segment(FRONT, round_index, k) for k in recorded.clients]
            rest = [self.segment(name, round_index, None) for name in names if name != FRONT]
            return VerticalModel(fronts, _in_a_row(rest)).eval()
        return _in_a_row([self.segment(name, round_index, client) for name in names]).eval()


def _in_a_row(segments: Sequence[nn.Sequential]) -> nn.Sequential:
    """Return the blocks of several segments as one; their names are distinct."""
    return nn.Sequential(OrderedDict(item for row in segments for item in row._modules.items()))
