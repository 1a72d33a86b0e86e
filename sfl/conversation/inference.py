"""Split inference with a trained model, as a service: both ends.

::

    requester (client_begin, client_infer)           server (server_serve)
    REQUEST_INFERENCE {model, cut, ...}          ->
                                                 <-  INFERENCE_READY {run, round, ...}
                                                 or  INVALID_MESSAGE: why not
                                                 or  TRY_AGAIN: all places are taken
    a batch, repeated:
      INFERENCE_BATCH {samples}                  ->
      INFERENCE_FEATURES + activations           ->
                                                 <-  INFERENCE_OUTPUTS + outputs {seconds}
    UNREGISTER                                   ->

A requester that holds the model's last segment is sent INFERENCE_FEATURES of the next cut instead,
and computes the outputs itself. ``seconds``: how long the server computed, with the last tensor of
a batch. Tensors pass through ``Cut``, as in training.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sfl import __version__
from sfl.archive.profile import Stopwatch
from sfl.config import RUN_NAME
from sfl.conversation.cut import INFERENCE, OUTPUTS, Cut
from sfl.conversation.join import parse_heartbeat
from sfl.conversation.limits import inference_limits
from sfl.conversation.passes import outputs_pass
from sfl.errors import NotFinite, ProtocolError, quoted
from sfl.files.checksum import File
from sfl.files.torch_file import are_finite
from sfl.model.task import Task
from sfl.model.topology import Holder, Relay, Route, Segments, route, stops
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import Message, MessageType


@dataclass(kw_only=True)
class InferenceParty:
    """One side of split inference: its trained segments, and a link to the other side."""

    holder: Holder
    link: Link
    split: SplitModel
    own_segments: Segments
    onward: None = None  # no hops stand between a requester and its server
    clock: Stopwatch = field(default_factory=Stopwatch)
    compute_s: float = 0.0  # spent on the current batch

    @property
    def task(self) -> Task:
        return self.split.recipe.task

    def link_at(self, cut: int) -> Link:
        return self.link

    @functools.cached_property
    def route(self) -> Route:
        return route(self.split.recipe.segments, self.holder)

    @contextlib.contextmanager
    def measure_compute(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.compute_s += time.perf_counter() - started

    @property
    def spent(self) -> dict[str, float]:
        """What the requester is told with the last tensor of a batch."""
        return {"seconds": round(self.compute_s, 6)}

    def end_wait(self) -> None: ...

    def check_finite(self, tensors: Iterable[Tensor], name: str, at: Position) -> None:
        """Check the peer's tensors.

        Raises:
            NotFinite: they hold NaN or infinity.
        """
        if not are_finite(tensors):
            raise NotFinite(f"{name} of batch {at.step} hold NaN, infinity or huge numbers")


class _Cuts(dict[int, Cut]):
    """One end of each cut, for one batch."""

    def __init__(self, party: InferenceParty, at: Position, num_samples: int) -> None:
        self._party, self.at, self.num_samples = party, at, num_samples

    def __missing__(self, link: int) -> Cut:
        at = self.at._replace(link=link)
        self[link] = Cut(self._party, at, self.num_samples, INFERENCE)
        return self[link]

    def pass_on(self, kind: str, relay: Relay) -> Conversation[None]:
        raise AssertionError("no hops stand between a requester and its server")


class _LastCut(Cut):
    """The server's end of the cut behind its last segment: what is sent tells what it took."""

    def __init__(self, party: InferenceParty, at: Position, num_samples: int) -> None:
        super().__init__(party, at, num_samples, INFERENCE)
        self._computing = party

    def send_file(self, kind: str, file: File, content: Any = "") -> None:
        super().send_file(kind, file, content or self._computing.spent)


def described(split: SplitModel) -> dict[str, Any]:
    """Return what both sides must have alike: the model, and how it is cut."""
    run = split.recipe.run
    return {
        "model": run.model,
        "cut": str(run.cut),
        "task": run.task,
        "input_shape": list(split.input_shape),
        "classes": split.num_classes,
    }


@dataclass(frozen=True)
class Offer:
    """What a server serves."""

    run: str
    round: int  # after which its segments were trained so
    seed: int
    back_checksum: str  # of its segments
    heartbeat_s: float  # interval at which it expects a requester's messages
    sfl: str = __version__

    @property
    def start(self) -> Position:
        return Position(self.run, self.round)


# The requester


def client_begin(party: InferenceParty, heartbeat_s: float) -> Conversation[Offer]:
    """Ask the server for its part of the model; return what it serves."""
    link = party.link
    content = described(party.split) | {"heartbeat_s": heartbeat_s, "sfl": __version__}
    link.send_message_as_json(MessageType.REQUEST_INFERENCE, content=content)
    yield link
    reply = link.receive_message_as_json(MessageType.INFERENCE_READY)
    link.heartbeat_s = parse_heartbeat(reply)
    run, sfl = reply.get("run", str), reply.get("sfl", str)[:40]
    if not RUN_NAME.fullmatch(run) or link.proved_run not in ("", run):
        raise ProtocolError(f"the server names its run {quoted(run, 80)}")
    link.limits = inference_limits(party.split, Holder.CLIENT)
    round_index, seed = reply.get("round", int), reply.get("seed", int)
    return Offer(run, round_index, seed, reply.get("back_checksum", str), link.heartbeat_s, sfl)


def client_infer(party: InferenceParty, x: Tensor, at: Position) -> Conversation[Tensor]:
    """Return the model's outputs (B, *output) for ``x``: (B, *input), on the CPU.

    B is at most ``split.evaluation_batch``. Faces a turn of ``server_serve``.
    """
    cuts = _Cuts(party, at, len(x))
    party.link.send_message_as_json(MessageType.INFERENCE_BATCH, content={"samples": len(x)}, at=at)
    outputs = yield from outputs_pass(party, cuts, x)
    if outputs is None:
        last = stops(party.route)[-1].gives
        assert last is not None
        outputs, _ = yield from cuts[last].receive(OUTPUTS)
    return outputs.cpu()


# The server


def server_serve(
    party: InferenceParty,
    offer: Offer,
    admit: Callable[[], None],
    on_batch: Callable[[int], None],
) -> Conversation[None]:
    """Serve one requester until it leaves.

    ``admit`` gives the requester a name, or raises NotYet; ``on_batch`` is given the number of
    samples of each batch that was served.

    Raises:
        ProtocolError: its front does not fit our segments; or as ``Cut.receive``.
    """
    link = party.link
    yield link
    hello = link.receive_message_as_json(MessageType.REQUEST_INFERENCE)
    check_alike(hello, described(party.split))
    link.heartbeat_s = parse_heartbeat(hello)
    admit()
    link.limits = inference_limits(party.split, Holder.SERVER)
    link.send_message_as_json(MessageType.INFERENCE_READY, content=asdict(offer))
    for step in itertools.count():
        at = offer.start._replace(step=step)
        yield link
        message = link.receive_message_as_json(MessageType.INFERENCE_BATCH, MessageType.UNREGISTER)
        if message.type is MessageType.UNREGISTER:
            return
        size = _batch_size(message, at, party.split.evaluation_batch)
        cuts = _Cuts(party, at, size)
        if (last := stops(party.route)[-1].gives) is not None:
            cuts[last] = _LastCut(party, at._replace(link=last), size)
        yield from _serve_batch(party, cuts)
        on_batch(size)


def _serve_batch(party: InferenceParty, cuts: _Cuts) -> Conversation[None]:
    party.compute_s = 0.0
    outputs = yield from outputs_pass(party, cuts, None)
    if outputs is not None:
        last = stops(party.route)[-1].takes
        assert last is not None
        cuts[last].send(OUTPUTS, outputs, party.spent)


def check_alike(hello: Message, ours: dict[str, Any]) -> None:
    """Check that a requester's segments and ours are of one model, cut alike.

    Raises:
        ProtocolError: they differ.
    """
    for name, value in ours.items():
        if (theirs := hello.get(name, type(value))) != value:
            raise ProtocolError(
                f"the front that you give has {name.replace('_', ' ')} {quoted(theirs)}, but the"
                f" model that is served here {quoted(value)}: export the front of the served run"
            )


def _batch_size(message: Message, at: Position, most: int) -> int:
    if message.at != at:
        raise ProtocolError(f"sent {message.type} for {message.at}, expected was {at}")
    if not 1 <= (size := message.get("samples", int)) <= most:
        raise ProtocolError(f"a batch of {size} samples; served are 1 to {most} at once")
    return size
