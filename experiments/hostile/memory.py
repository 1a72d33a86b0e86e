"""What a client may do to take its server's memory, and a server its client's.

``experiments.hostile`` tries it. Memory is a process's peak (``VmHWM``), as Linux counts it, before
and after.
"""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.hostile.insiders import (
    FEATURES,
    LABELS,
    NUM_CLASSES,
    SHAPE,
    Claim,
    Insider,
    takes_its_own_place,
)
from experiments.hostile.target import Target, heard
from sfl.config import RunConfig
from sfl.conversation.join import Welcome, server_join
from sfl.conversation.party import TEST, VALIDATION
from sfl.conversation.round import SECONDS_WIDTH, TIMES
from sfl.errors import ProtocolError, SflError
from sfl.files.torch_file import encode, encode_state
from sfl.runtime.report_limits import MOST_STEPS
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.connection import Connection
from sfl.transport.listener import Listener
from sfl.wire.driver import Conversation, run_blocking
from sfl.wire.link import ANY_ID
from sfl.wire.messages import Limits, Message, MessageType

FLOOD_BATCH = 256
FLOOD_STEPS = 250  # of 0.8 MB each way
BLOCKED_S = 3.0  # after which the server takes no more
SERVER = ["--clients", "1", "--partition", "own", "--rounds", "1", "--keep-tensors", "none"]
CUT = ["--model", "mlp", "--cut", "1", "--batch-size", str(FLOOD_BATCH)]


def peak_bytes(process: int) -> int:
    """Return how much memory a process has had at most."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


Do = Callable[[Insider], str]


@dataclass(frozen=True)
class Greed:
    """One attack."""

    server: list[str]  # options
    claim: Claim
    first: Callable[[Insider], object]  # what an honest client does first
    do: Do  # returns what came of it
    bound_bytes: int  # by which the server may grow


def _zeros(*shape: int, integers: bool = False) -> bytes:
    return encode(torch.zeros(shape, dtype=torch.int64 if integers else torch.float32))


def _sent_until_blocked(insider: Insider, sends: Iterator[Callable[[], None]]) -> int:
    """Send and read nothing, until the server takes no more; return how often it did."""
    insider.link._stream.set_timeout(BLOCKED_S)
    count = 0
    with contextlib.suppress(SflError):
        for send in sends:
            send()
            count += 1
    return count


def take_step(insider: Insider, step: int = 0) -> None:
    """Send one step over the cut."""
    insider.send(LABELS, _zeros(FLOOD_BATCH, integers=True), step)
    insider.send(FEATURES, _zeros(FLOOD_BATCH, 784), step)


def _answered(insider: Insider, kind: MessageType) -> None:
    insider.link.limits = Limits(payload_bytes={kind: 2**21})
    insider.link.receive_file(kind)


def step(insider: Insider) -> None:
    """Take the first step as one should."""
    take_step(insider)
    _answered(insider, MessageType.TRAINING_GRADS)


def flood_steps(insider: Insider) -> str:
    """Send every step of the round, and read no gradients."""
    sends = (functools.partial(take_step, insider, i) for i in range(1, FLOOD_STEPS))
    return f"took {_sent_until_blocked(insider, sends)} of {FLOOD_STEPS} steps"


def _model(insider: Insider) -> SplitModel:
    return SplitModel(Recipe.of(insider.welcome.run), SHAPE, NUM_CLASSES)


def send_gradients(insider: Insider, data: bytes, step: int = 0) -> None:
    """Send the gradients of one step of synchronous SGD."""
    kind, figures = MessageType.TRAINING_GRADS, {"loss": 1.0, "correct": 0}
    insider.link.send_file(kind, data, content=figures, at=insider.at(step))


def zero_gradients(insider: Insider) -> bytes:
    """Return a file of gradients of the whole model."""
    spec = _model(insider).parameters_spec
    return encode_state({name: torch.zeros(of.shape) for name, of in spec.items()})


def gradients(insider: Insider) -> None:
    """Take the first step of synchronous SGD as one should."""
    send_gradients(insider, zero_gradients(insider))
    _answered(insider, MessageType.SEND_AGGREGATED_MODEL)


def flood_gradients(insider: Insider) -> str:
    """Send every step's gradients, and read no weights."""
    data = zero_gradients(insider)
    sends = (functools.partial(send_gradients, insider, data, i) for i in range(1, FLOOD_STEPS))
    return f"took {_sent_until_blocked(insider, sends)} of {FLOOD_STEPS} steps"


def flood_heartbeats(insider: Insider) -> str:
    """Send signs of life for some seconds, as fast as they go."""
    count, until = 0, time.monotonic() + BLOCKED_S
    while time.monotonic() < until:
        insider.link.send_heartbeat(0.0)
        count += 1
    return f"took {count // 1000 * 1000:,} heartbeats"


def long_figures(insider: Insider) -> str:
    """Take part in a round of as many steps as a client may have, and in its end."""
    link, at = insider.link, insider.at()
    table = encode(torch.zeros(MOST_STEPS, 2, dtype=torch.float64))
    link.send_file(MessageType.TRAINING_FIGURES, table, at=at)
    spent = dict.fromkeys(TIMES, f"{0:0{SECONDS_WIDTH}.6f}")
    link.send_message_as_json(MessageType.ROUND_TRAINED, content=spent, at=at)
    insider.upload(encode_state(_model(insider).front_state()))
    nothing = {"samples": 0, "correct": 0, "loss_sum": 0.0, "per_class": []}
    for part in (VALIDATION, TEST):
        link.receive_message_as_json(MessageType.START_VALIDATION)
        if part == VALIDATION:
            insider.decline_weights()
        content = nothing | {"part": part}
        link.send_message_as_json(MessageType.VALIDATION_RESULT, content=content, at=at)
    link.receive_message_as_json(MessageType.VALIDATION_DONE)
    link.receive_message_as_json(MessageType.TRAINING_DONE)  # the round's log has been written
    return f"took the figures of {MOST_STEPS:,} steps"


GREEDY: dict[str, Greed] = {
    "steps, and nothing is read": Greed(
        [*SERVER, *CUT], Claim(train=FLOOD_BATCH * FLOOD_STEPS), step, flood_steps, 32 * 2**20
    ),
    "gradients, and nothing is read": Greed(
        [*SERVER, "--model", "mlp", "--batch-size", "4", "--scheme", "sync-sgd"],
        Claim(train=4 * FLOOD_STEPS), gradients, flood_gradients, 32 * 2**20,
    ),
    "heartbeats, and nothing is read": Greed(
        [*SERVER, *CUT], Claim(train=2 * FLOOD_BATCH), step, flood_heartbeats, 32 * 2**20
    ),
    "the longest figures": Greed(
        [*SERVER, "--model", "mlp", "--batch-size", "1", "--scheme", "fl"],
        Claim(MOST_STEPS, 0, 0), lambda insider: None, long_figures, 512 * 2**20,
    ),
}  # fmt: skip
# What is refused at once: a claim, and the options of the server that make it a large one.
CLAIMS: dict[str, tuple[list[str], Claim]] = {
    "10^9 samples": ([*SERVER, *CUT], Claim(train=10**9)),
    "10^9 samples to evaluate": ([*SERVER, *CUT], Claim(validation=10**9)),
    "10^7 samples, a step each": (
        [*SERVER, "--model", "mlp", "--batch-size", "1", "--scheme", "fl"], Claim(train=10**7 - 10),
    ),
    "predictions of 4 GB": ([*SERVER, *CUT], Claim(test=10**6, num_classes=1000)),
    "a class of 2^31 samples": (
        [*SERVER, *CUT, "--class-weights", "balanced"],
        Claim(class_counts=(2**31 - 1, *[0] * (NUM_CLASSES - 1))),
    ),
    "more samples than MNIST has": (
        ["--clients", "1", "--dataset", "mnist", "--model", "mlp"], Claim(train=70_001),
    ),
}  # fmt: skip


def try_greed(target: Target, process: int, greed: Greed) -> tuple[int, str]:
    """Be a run's client and take memory; return how much the server has grown, and its answer."""
    with target.reach() as stream:
        insider = Insider(stream, claim=greed.claim)
        insider.begin()
        greed.first(insider)
        before = peak_bytes(process)
        answer = greed.do(insider)
        return peak_bytes(process) - before, answer


def try_own_place(target: Target, process: int) -> tuple[int, str]:
    """Take one's own place over and over; return how much the server has grown, and its answer."""
    before = peak_bytes(process)
    answer = takes_its_own_place(target)
    return peak_bytes(process) - before, answer


# What a server names that a client would allocate for.
WISHES: dict[str, dict[str, Any]] = {
    "images of 4096 x 4096": {"model": "lenet5", "image_size": 4096},
    "images of 4096 x 4096, to a perceptron": {"model": "mlp", "image_size": 4096},
    "a batch of 2^20": {"model": "cnn-femnist", "image_size": 224, "batch_size": 2**20},
    "a whole vgg16 of large images": {"model": "vgg16", "scheme": "fl", "image_size": 1024},
    "HAM10000, decoded to 4096 x 4096": {
        "model": "resnet18", "dataset": "ham10000", "image_size": 4096, "batch_size": 1,
    },
}  # fmt: skip


def no_checks(hello: Message) -> Conversation[None]:
    """Answer nobody who only checks."""
    raise ProtocolError("nobody is checked here")


def try_wish(listener: Listener, wish: Mapping[str, Any], process: int) -> tuple[int, str]:
    """Be a client's server and name too much; return the client's growth, and its answer."""
    sock = listener.accept()
    assert sock
    with Connection(sock, timeout_s=60, limits=Limits()) as link:
        link.name = "server"
        before = peak_bytes(process)
        run = RunConfig(run="r", clients=1, **wish)
        welcome = Welcome(ANY_ID, run, 0, heartbeat_s=10.0)
        try:
            run_blocking(server_join(link, welcome, lambda wanted, instance: 0, no_checks))
            answer = "took part"
        except SflError as error:
            answer = str(error)
        return peak_bytes(process) - before, answer


def try_claim(target: Target, claim: Claim, process: int) -> tuple[int, str]:
    """Report what is too much; return by how much the server has grown, and its answer."""
    before = peak_bytes(process)
    with target.reach() as stream:
        answer = heard(Insider(stream, claim=claim).link)
    with contextlib.suppress(AssertionError, OSError):  # it has ended
        return peak_bytes(process) - before, answer
    return 0, answer
