"""``export``: one part of a run's trained model as one file, for others to use without SFL."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfl import __version__
from sfl.errors import ConfigError, RunError, after_round
from sfl.files.atomic import write_file
from sfl.files.torch_file import TensorSpec
from sfl.interactive.run import Run
from sfl.model.fusion import pack
from sfl.model.portable import WHOLE, About
from sfl.model.topology import FRONT, Holder, joined
from sfl.registry import named
from sfl.runtime.start_weights import checksum_of
from sfl.trained.kinds import KINDS, NUM_SAMPLES
from sfl.trained.models import usable


@dataclass(frozen=True)
class Exported:
    """A file that was written: where, what it says of itself, and what its making has shown."""

    path: Path
    about: About
    round: int  # after which the weights are
    shown: str  # "" if nothing

    @property
    def lines(self) -> list[str]:
        """What happened, for the user."""
        about, size = self.about, self.path.stat().st_size
        takes = f"{about.model}, takes {list(about.takes)}"
        written = (
            f"{about.part} of {about.run} {after_round(self.round)} ({takes}):"
            f" {self.path}, {size:,} bytes"
        )
        return [line for line in (self.shown, written) if line]


def export(
    run: Run,
    to: str,
    part: str = WHOLE,
    *,
    round: int | None = None,
    client: int | None = None,
    out: str | os.PathLike[str] = "",
) -> Exported:
    """Write a part of a run's trained model as one file.

    ``to``: a kind of ``KINDS``. ``part``: "whole", or a segment's name. ``round`` and ``client`` as
    for ``Run.segment``. ``out``: the file; if not given, one of this folder, named after run and
    part.

    Raises:
        ConfigError: there is no such kind, a package that it needs is missing, ``out`` has another
            suffix, or such a part is none of one module and one party.
        RunError: the part's weights do not lie on this machine or are no numbers, or it cannot be
            exported.
        IntegrityError: a file of the run is damaged.
    """
    kind = named("kind of file", to, KINDS)
    _check_part(run, part, client)
    if out and Path(out).suffix != kind.suffix:  # of another, torch.export.load warns
        raise ConfigError(f"--out {out}: a file of --to {to} has a name that ends in {kind.suffix}")
    is_whole = part == WHOLE
    found = run.model(round, client) if is_whole else run.segment(part, round, client)
    module = usable(run, found, round)
    about = _about(run, part, round, client)
    made = kind.make(module, _made_up(_takes(run, part, client)), about)
    whose = "" if client is None else f"_client_{client}"
    path = Path(out or f"{about.run}_{part}{whose}{kind.suffix}")
    write_file(path, made.data)
    return Exported(path, about, run.last_round(round), made.shown)


def _check_part(run: Run, part: str, client: int | None) -> None:
    """Check that a part is one module, and a client's if one is named."""
    if part == WHOLE and run.recipe.joins:
        further = run.segments[1:]
        raise ConfigError(
            "--part whole: in a vertical run each client has a front of its own: write each with"
            f" --part front --client K, and what follows with --part {' or '.join(further)}; the"
            f" {further[0]} takes their activations, flattened and side by side"
        )
    holder = run.recipe.segments.get(part, Holder.CLIENT)
    if client is not None and holder is not Holder.CLIENT:
        raise ConfigError(
            f"--client {client}: the {part} is the {holder.role}'s; leave --client out"
        )


def back_checksum(run: Run, round: int | None = None) -> str:
    """Return a checksum of the server's segments after a round; "" if none lie here."""
    split = run.split
    names = split.held_by(Holder.SERVER) if split.cuts else []
    try:
        states = {name: run.segment(name, round).state_dict() for name in names}
    except RunError:  # another server has them, or --keep-models has removed them
        return ""
    return checksum_of(joined(states)) if states else ""


def _about(run: Run, part: str, round: int | None, client: int | None) -> About:
    """Return what a part of a run's model is, and what it expects."""
    said, config = run.normalisation, run.config
    split = run.split if client is None else run.split.of_party(client)
    whose = run.recipe.leader(0) if client is None else client  # its model goes on behind a fusion
    return About(
        part=part,
        model=run.recipe.model_name(whose),
        cuts=split.cuts,
        task=config.task,
        input_shape=split.input_shape,
        takes=_takes(run, part, client).shape,
        mean=said.mean,
        std=said.std,
        classes=said.classes,
        run=config.run,
        seed=config.seed,
        round=run.last_round(round),
        back_checksum=back_checksum(run, round),
        sfl_version=__version__,
    )


def _takes(run: Run, part: str, client: int | None) -> TensorSpec:
    """Return the spec of one sample as a part takes it: of the data, or behind a cut."""
    split = run.split if client is None else run.split.of_party(client)
    if part in (WHOLE, FRONT):
        return TensorSpec(split.input_shape, torch.float32)
    before = run.segments.index(part) - 1  # the cut
    if split.joint is not None and not before:  # which all clients' activations enter, packed
        samples = {
            k: torch.empty(1, *s.shape, dtype=s.dtype) for k, s in split.joint.samples.items()
        }
        return TensorSpec.of(pack([*samples.values()])[0])
    return split.features_sample(before)


def _made_up(spec: TensorSpec) -> Tensor:
    """Return samples of normally distributed values, the same each time."""
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(NUM_SAMPLES, *spec.shape, generator=drawn).to(spec.dtype)
