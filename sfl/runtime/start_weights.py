"""The weights that a run starts from instead of those drawn from its seed: ``--init``.

They are read before anything starts. Once the model is built they take their place among the
weights at the first round's start; from there they are recorded, replayed, and handed to the
clients like those of any other round.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sfl.archive
from sfl.errors import ConfigError
from sfl.files.torch_file import TensorSpec, are_finite
from sfl.model.topology import FRONT, States, joined
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.trusted_imports import remembered

PRETRAINED = "pretrained"


def checksum_of(state: Mapping[str, Tensor]) -> str:
    """Return a checksum of names, types, shapes and bytes: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        data = tensor.detach().contiguous()
        digest.update(f"{name} {data.dtype} {list(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class StartWeights:
    """Weights by their names in the whole model: of all of it, or of some blocks."""

    state: Mapping[str, Tensor]
    source: str  # for users
    is_whole: bool
    head: str = ""  # a block that may have other shapes, and is then drawn from the seed

    @functools.cached_property
    def checksum(self) -> str:
        """Their checksum, see ``checksum_of``."""
        return checksum_of(self.state)

    def into(self, split: SplitModel, initial: States) -> dict[str, Mapping[str, Tensor]]:
        """Return the initial weights of segments with these in place of the seed's.

        Raises:
            ConfigError: they do not fit the run's model.
        """
        given = self.fitting(split)
        return {
            segment: {name: given.get(name, drawn) for name, drawn in state.items()}
            for segment, state in initial.items()
        }

    def fitting(self, split: SplitModel) -> Mapping[str, Tensor]:
        """Return those of the weights that the run's model takes: all, or all but the head's.

        Raises:
            ConfigError: they do not fit it.
        """
        own = FRONT if split.recipe.joins else ""  # each client's, of which a server has none
        specs = {n: s for name, of in split.specs.items() if name != own for n, s in of.items()}
        head = [name for name in self.state if _block(name) == self.head]
        if any(TensorSpec.of(self.state[name]) != specs.get(name) for name in head):
            given = {n: t for n, t in self.state.items() if n not in head}
        else:
            given = dict(self.state)
        if why := self._why_different(given, specs) or _why_wrong(given, split):
            raise ConfigError(f"--init: {self.source} do not fit this run's model: {why}")
        return given

    def _why_different(self, given: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> str:
        for name, tensor in given.items():
            if name not in specs:
                return f"they have {name}, which is none of the weights that a server starts with"
            ours, theirs = specs[name], TensorSpec.of(tensor)
            if theirs != ours:
                return f"{name} is {_shown(theirs)}, and the model's is {_shown(ours)}"
        blocks = set(map(_block, given))
        whole = set(map(_block, specs)) - {self.head} if self.is_whole else blocks
        lacking = [n for n in specs if n not in given and _block(n) in whole | blocks]
        return f"they lack {lacking[0]}" if lacking else ""

    def line(self, split: SplitModel) -> str:
        """Return a line for the log: what starts from these weights, and what from the seed."""
        known = _blocks_of(self.fitting(split))
        names = [name for spec in split.specs.values() for name in spec]
        drawn = [block for block in _blocks_of(names) if block not in known]
        rest = f"; drawn from the seed: {', '.join(drawn)}" if drawn else ""
        return f"starts from {self.source}, checksum {self.checksum}{rest}"


def _block(name: str) -> str:
    """Return the block of a weight."""
    return name.partition(".")[0]


def _blocks_of(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(_block, names)))


def _shown(spec: TensorSpec) -> str:
    return f"{list(spec.shape)} {spec.dtype}".replace("torch.", "")


def _why_wrong(given: Mapping[str, Tensor], split: SplitModel) -> str:
    """Return what no weights of the model can be: not finite, or two values of one tensor."""
    for name, tensor in given.items():
        if not are_finite(split.changing({name: tensor})):
            return f"{name} holds NaN, infinity, or numbers whose squares overflow"
    for name, first in split.entries.same.items():
        values = [given[n] for n in (name, first) if n in given]
        if values and not (len(values) == 2 and torch.equal(*values)):
            return f"{name} is {first} in the model, and has a value of its own"
    return ""


def read_start(init: str, recipe: Recipe) -> StartWeights | None:
    """Return the weights that ``--init`` names; None if it names none.

    Raises:
        ConfigError: it names no weights, or not those of ``--init-checksum``.
        RunError, IntegrityError: they cannot be read or downloaded.
    """
    wanted = recipe.run.init_checksum
    start = _read(init, recipe) if init else None
    if wanted and (start is None or start.checksum != wanted):
        found = f"--init {init} has {start.checksum}" if start else "there is no --init"
        raise ConfigError(
            f"--init-checksum {wanted}: {found}; give the weights that have it (or, for others,"
            " --init-checksum '')"
        )
    return start


def started(recipe: Recipe, start: StartWeights | None) -> Recipe:
    """Return the recipe of a run that starts from these weights."""
    return recipe.changed(init_checksum=start.checksum) if start else recipe


def _read(init: str, recipe: Recipe) -> StartWeights:
    path = Path(init).expanduser()
    if init == PRETRAINED:
        return _of_model(recipe)
    if path.is_dir():
        return _of_run(path, recipe)
    if path.is_file():
        return _of_file(path)
    raise ConfigError(
        f"--init {init}: there is no such run or file; give a run's folder, a file of sfl-export"
        f" --to torch, or {PRETRAINED}"
    )


def _of_run(path: Path, recipe: Recipe) -> StartWeights:
    """Return the whole model after a run's last finished round."""
    from sfl.runtime.recorded_run import RecordedRun  # a run that does not ask needs none of it

    allowed = remembered() | {recipe.run.model}
    recorded = RecordedRun(sfl.archive.open(path), torch.device("cpu"), allowed)
    done = recorded.num_finished
    if not done:
        raise ConfigError(f"--init {path}: the run has not finished a round")
    shared = recorded.shared_at(done)
    for name in recorded.split.specs:
        if name not in shared:
            is_hops = recorded.recipe.segments[name].is_hop
            raise ConfigError(
                f"--init {path}: has no weights of the {name}, which"
                f" {'a hop' if is_hops else 'each client or a fed server'} keeps; give a file of"
                " sfl-export --to torch: of the whole model, where these lie, or of another --part"
            )
    state = joined({name: shared[name].state for name in recorded.split.specs})
    return StartWeights(state, f"the weights of {path} after round {done}", is_whole=True)


def _of_file(path: Path) -> StartWeights:
    from sfl.model.portable import WHOLE, read_portable

    portable = read_portable(path)
    part = portable.about.part
    if not portable.state:
        raise ConfigError(f"--init {path}: the file holds no weights (of the {part})")
    return StartWeights(portable.state, f"the weights in {path} ({part})", part == WHOLE)


def _of_model(recipe: Recipe) -> StartWeights:
    """Return the weights that come with a model of another project."""
    load = recipe.model.pretrained
    if load is None:
        raise ConfigError(f"--init {PRETRAINED}: there are none for --model {recipe.run.model}")
    state = load()
    head = _blocks_of(state)[-1]  # of other classes
    return StartWeights(state, "torchvision's pretrained weights", is_whole=True, head=head)
