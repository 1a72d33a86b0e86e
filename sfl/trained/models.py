"""Trained models to predict with: a run's own, or a front here and its back at a server."""

import contextlib
import itertools
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sfl.archive.run_folder import say
from sfl.config import RunConfig
from sfl.conversation.inference import InferenceParty, Offer, client_begin, client_infer
from sfl.data.client_data import DatasetSpec
from sfl.data.samples import Samples
from sfl.errors import ConfigError, IntegrityError, RunError, after_round, counted
from sfl.files.torch_file import StateSpec, are_finite, state_spec
from sfl.interactive.run import Run
from sfl.model.portable import About, Portable, read_portable
from sfl.model.segment import computing
from sfl.model.task import Task
from sfl.model.topology import Holder, Segments
from sfl.model.zoo import Shape, make_model
from sfl.nodes import ClientNode
from sfl.options import from_values
from sfl.runtime.access import Access, closing_with_reason
from sfl.runtime.memory import client_bytes, sizes_of, why_too_large
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import MAX_EVALUATION_BATCH, SplitModel
from sfl.trained.inputs import Expected, expected_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.tokens import SERVER
from sfl.transport.transports import transport_to
from sfl.trusted_imports import remembered
from sfl.wire.driver import run_blocking
from sfl.wire.link import ANY_ID, CLIENT, Peer
from sfl.wire.members import Channel
from sfl.wire.messages import MessageType

Module = TypeVar("Module", bound=nn.Module)


class Model(Protocol):
    """A trained model."""

    @property
    def expected(self) -> Expected: ...

    @property
    def task(self) -> Task: ...

    def outputs(self, x: Tensor) -> Tensor:
        """Return the outputs (B, *output) for a batch ``x`` (B, *input), on the CPU."""


def usable(run: Run, module: Module, round_index: int | None) -> Module:
    """Return a part of a run's trained model, if its weights are numbers.

    Raises:
        RunError: they are not: the run has diverged.
    """
    if not are_finite(run.split.changing(module.state_dict())):
        raise RunError(
            f"{run.path}: weights {after_round(run.last_round(round_index))} hold NaN, infinity, or"
            " numbers whose squares overflow: the run has diverged; an earlier round may be usable"
        )
    return module


class RunsModel:
    """The joined model of a run, on this machine."""

    def __init__(
        self, run: Run, round_index: int | None, client: int | None, device: torch.device
    ) -> None:
        self.expected, self.task = expected_of(run), run.recipe.task
        model = usable(run, run.model(round_index, client), round_index)
        self._model, self._device = model.to(device), device

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        with computing("the model cannot compute these samples"):
            outputs: Tensor = self._model(x.to(self._device))
        return outputs.cpu()


@dataclass(frozen=True)
class Front:
    """The client's segments of a trained model, from files."""

    about: About
    split: SplitModel
    segments: Segments

    @property
    def expected(self) -> Expected:
        """What the model expects. Floats beyond [0, 1] are right if the mean or std lies there."""
        about = self.about
        spec = DatasetSpec(_not_loaded, about.input_shape, about.classes, about.mean, about.std)
        any_range = not spec.has_images or max(map(abs, (*about.mean, *about.std))) > 1
        return Expected(spec, any_range, self.split.evaluation_batch)


def _not_loaded(source: object) -> tuple[Samples, Samples]:
    raise AssertionError("the samples are the user's own")


def read_front(files: Sequence[str], node: ClientNode, device: torch.device) -> Front:
    """Read the client's segments from files that ``sfl-export --to torch`` has written.

    Raises:
        RunError, IntegrityError: a file cannot be read, is damaged, or does not fit its model.
        ConfigError: the files are not all of one client's segments, or their model is a user's own
            that may not be imported.
    """
    parts = {path: read_portable(path) for path in files}
    about = next(iter(parts.values())).about
    if any(_model_of(part.about) != _model_of(about) for part in parts.values()):
        raise ConfigError(f"--front: {', '.join(parts)} are parts of different models")
    if not about.cuts:
        raise ConfigError(f"--front {files[0]}: is of a model without a cut: there is no front")
    options: dict[str, Any] = {
        "model": about.model,
        "cut": ",".join(map(str, about.cuts)),
        "task": about.task,
        "seed": about.seed,
        "run": about.run,
    }
    run = from_values(RunConfig, options, files[0])
    recipe = Recipe.of(run, node.allowed_imports | remembered())
    needed = [name for name, holder in recipe.segments.items() if holder is Holder.CLIENT]
    given = [part.about.part for part in parts.values()]
    if sorted(needed) != sorted(given):
        raise ConfigError(
            f"--front: given is {', '.join(given)}; the client's part of {recipe.title} is"
            f" {' and '.join(needed)}: export {'it' if len(needed) == 1 else 'them'}, and give the"
            f" {counted(len(needed), 'file')}{', with a comma between them' * (len(needed) > 1)}"
        )
    _check_before_building(parts, recipe, node)
    split = SplitModel(recipe, about.input_shape, len(about.classes))
    segments = split.segments(Holder.CLIENT, device)
    for path, part in parts.items():
        _check_fits(path, part, split.specs[part.about.part])
        if not are_finite(split.changing(part.state)):
            raise IntegrityError(f"{path}: its weights hold NaN, infinity or huge numbers")
        segments[part.about.part].load(part.state)
    return Front(about, split, segments)


def _model_of(about: About) -> About:
    return replace(about, part="", takes=(), sfl_version="")


def _check_before_building(parts: Mapping[str, Portable], recipe: Recipe, node: ClientNode) -> None:
    """Check what files say of their model before any of it is allocated.

    Raises:
        ConfigError: it is too large for this machine.
        IntegrityError: it does not fit the files' own weights, or is strange.
    """
    path, about = next((path, part.about) for path, part in parts.items())
    shape, num_classes = about.input_shape, len(about.classes)
    for name, values in (("mean", about.mean), ("std", about.std)):
        if len(values) not in (1, shape[0]):
            raise IntegrityError(
                f"{path}: has {counted(len(values), 'value')} of {name} for samples of shape"
                f" {list(shape)}: it needs one, or one for each channel"
            )
    needed = client_bytes(
        1, sizes_of(recipe, shape, num_classes), most_samples=MAX_EVALUATION_BATCH, hosted=1
    )
    if why := why_too_large(needed, node, f"{path}: {about.model} for samples {list(shape)}"):
        raise ConfigError(why)
    for segment, spec in _specs_of(recipe, shape, num_classes).items():
        for path, part in parts.items():
            if part.about.part == segment:
                _check_fits(path, part, spec)


def _specs_of(recipe: Recipe, shape: Shape, num_classes: int) -> dict[str, StateSpec]:
    """Return the specs of a model's segments, without allocating them; none if it needs that."""
    spec, cuts = recipe.party(0)
    try:
        with torch.device("meta"):
            model = make_model(spec, shape, num_classes, seed=recipe.run.seed)
    except ConfigError:  # a user's own; or one that cannot be built, which is said then
        return {}
    blocks = [(name, block) for name, block in model._modules.items() if block is not None]
    bounds = itertools.pairwise((0, *cuts, len(blocks)))
    rows = (nn.Sequential(OrderedDict(blocks[start:end])) for start, end in bounds)
    return {n: state_spec(row.state_dict()) for n, row in zip(recipe.segments, rows, strict=True)}


def _check_fits(path: str, part: Portable, spec: StateSpec) -> None:
    if state_spec(part.state) != spec:
        raise IntegrityError(
            f"{path}: its weights are not those of the {part.about.part} of {part.about.model} as"
            " this SFL builds it"
        )


def apart(about: About, offer: Offer) -> str:
    """Return in what a front and a server's part are not of one model; "" if in nothing."""
    both = {
        "runs": (about.run, offer.run),
        "seeds": (about.seed, offer.seed),
        "rounds": (about.round + 1, offer.round + 1),
    }
    differ = [f"{name} {us} and {them}" for name, (us, them) in both.items() if us != them]
    if about.back_checksum not in ("", offer.back_checksum):
        differ.append("other weights of the server's part")
    return ", ".join(differ)


class ServedModel:
    """A front on this machine, and the rest of the model at a server."""

    def __init__(self, front: Front, party: InferenceParty, link: Channel, offer: Offer) -> None:
        self.expected, self.task = front.expected, party.task
        self._party, self._link, self._offer = party, link, offer
        self._seconds: list[float] = []
        self._began = self._moved

    @property
    def _moved(self) -> tuple[int, int]:
        counters = self._link.counters
        return counters.bytes_sent, counters.bytes_received

    def outputs(self, x: Tensor) -> Tensor:
        began = time.perf_counter()
        at = self._offer.start._replace(step=len(self._seconds))
        outputs = run_blocking(client_infer(self._party, x, at))
        self._seconds.append(time.perf_counter() - began)
        return outputs

    def traffic(self) -> str:
        """Return in one line how long the batches took, and how many bytes they were."""
        if not self._seconds:
            return "nothing was sent"
        sent, received = (now - then for now, then in zip(self._moved, self._began, strict=True))
        return f"{latency(self._seconds)}; {sent:,} bytes sent, {received:,} received"


def latency(seconds: Sequence[float]) -> str:
    """Return what batches took: how many, their median, and what 95 % of them stay within."""
    ordered, count = sorted(seconds), len(seconds)
    median, slow = statistics.median(ordered), ordered[math.ceil(0.95 * count) - 1]
    return (
        f"{count} batch{'' if count == 1 else 'es'}: median latency {1e3 * median:.1f} ms,"
        f" 95 % within {1e3 * slow:.1f} ms"
    )


@contextlib.contextmanager
def served(files: Sequence[str], node: ClientNode, device: torch.device) -> Iterator[ServedModel]:
    """Connect to a server that holds the back of a run; give it the activations of this front.

    Raises:
        ConfigError, RunError, IntegrityError: as ``read_front``; the server cannot be reached.
        AuthError: one side lacks the other's token or certificate.
        PeerFailed, ConnectionLost, ProtocolError: the server refused us, or was lost.
    """
    front = read_front(files, node, device)
    with transport_to(node.server).client(node, say) as dialler:
        access = Access.of(node, dialler)
        link = access.connect(node.server, node)
        link.name, link.peer_name = "requester", "server"
        with closing_with_reason(link):
            only = access.tokens.only_client if access.tokens else None
            access.authenticate(link, Peer(CLIENT, ANY_ID if only is None else only), SERVER)
            party = InferenceParty(
                holder=Holder.CLIENT, link=link, split=front.split, own_segments=front.segments
            )
            offer = run_blocking(client_begin(party, interval_s(node.peer_timeout)))
            if differ := apart(front.about, offer):
                say(
                    "warning: the front and the server's part fit, but were not trained together:"
                    f" {differ}"
                )
            yield ServedModel(front, party, link, offer)
            link.send_message_as_json(MessageType.UNREGISTER)
        link.close_gracefully()


def run_of(path: str, machine: Mapping[str, Any]) -> Run:
    """Open a run, and warn about what may change the last bit here."""
    run = Run(Path(path), **machine)
    for difference in run.differences:
        say(f"warning: here {difference} of the run: the last bit may differ")
    return run
