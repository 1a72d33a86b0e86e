"""Register a client and report its data: both ends.

::

    client (client_join)                             server (server_join)
    REGISTER {client_id, instance, fingerprint}  ->
                                                 <-  REGISTERED {client_id, config, round, ...}
                                                 or  INVALID_MESSAGE: why not
    REQUEST_TO_START {samples, classes, ...}     ->  once its data are loaded
                                                 <-  MESSAGE: which clients are still missing
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sfl import __version__
from sfl.archive.records import MAX_CLASSES, classes_of, data_of, digest_of, samples_of, shape_of
from sfl.config import RunConfig
from sfl.conversation.alignment import aligned_counts, server_receive_ids
from sfl.conversation.party import TEST, TRAIN, VALIDATION
from sfl.data.class_names import listed
from sfl.data.client_data import ClientData
from sfl.data.datasets import dataset_of
from sfl.data.partition import OWN, VERTICAL
from sfl.data.vertical import Ids, strip_of
from sfl.environment import check_fingerprint
from sfl.errors import ConfigError, DataError, ProtocolError, RunError, quoted
from sfl.model.class_weights import BALANCED, class_weights
from sfl.model.structure import CHECKSUM, DIGEST, MAX_DIGESTS
from sfl.options import from_values
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import Conversation
from sfl.wire.link import ANY_ID, CLIENT, Link, Peer, one_line
from sfl.wire.messages import Message, MessageType

MAX_ROUNDS_KEPT = 16
SHORTEST_HEARTBEAT_S = 0.01
HASHED_BYTES = 2**26  # most bytes of samples in memory at once while they are hashed


@dataclass(frozen=True)
class DataReport:
    """What a client reports of its data and its model."""

    num_samples: Mapping[str, int]  # of "train", "validation" and "test"
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    digest: str  # of the run's name and the samples: detects other data after a restart
    class_counts: tuple[int, ...] = ()  # of the training samples, with --class-weights balanced
    rounds: tuple[int, ...] = ()  # whose own state the client has on disk; empty: it needs none
    structure: tuple[str, ...] = ()  # digests of the model it built, see ``sfl.model.structure``
    weights: str = ""  # checksum of the front's initial weights, as drawn at the client

    @classmethod
    def of(cls, data: ClientData, run: RunConfig, *, keeps_labels: bool = False) -> "DataReport":
        """``keeps_labels``: nothing of the labels may be told, not even a hash."""
        parts = {TRAIN: data.train, VALIDATION: data.validation, TEST: data.test}
        counts = {name: len(samples) for name, samples in parts.items()}
        digest = hashlib.sha256(run.run.encode())
        at_once = max(HASHED_BYTES // (4 * math.prod(data.input_shape)), 1)
        for samples in parts.values():
            for rows in torch.split(torch.arange(len(samples)), at_once):
                digest.update(samples.take(rows).x.numpy().tobytes())
            if not keeps_labels:
                digest.update(samples.y.numpy().tobytes())
        class_counts: list[int] = []
        if run.class_weights == BALANCED:
            class_counts = torch.bincount(data.train.y, minlength=len(data.classes)).tolist()
        return cls(counts, data.classes, data.input_shape, digest.hexdigest(), tuple(class_counts))


@dataclass(frozen=True)
class Joined:
    """A client that has joined and loaded its data."""

    client: int
    link: Link
    fingerprint: Mapping[str, str]
    data: DataReport
    ids: Ids | None = None  # of its samples, where they are to be aligned


HERE, APART = "here", "apart"  # the fed server: in the main server's process, or behind a store


@dataclass(frozen=True)
class Welcome:
    """The server's answer to a registration."""

    client: int
    run: RunConfig
    first_round: int  # the first that is not done
    resumed: bool = False  # the run was started before: the client's folder may exist
    fed: str = HERE  # where the fed server is: HERE, APART, or HOST:PORT
    heartbeat_s: float = 0.0  # interval at which the server expects a client's messages
    known: frozenset[int] = frozenset()  # clients that have registered before
    sfl: str = __version__  # the server's version


def client_join(
    link: Link,
    wanted_id: int | None,
    fingerprint: Mapping[str, str],
    *,
    instance: str,
    heartbeat_s: float,
) -> Conversation[Welcome]:
    """Register, and return the server's answer.

    ``instance`` is a random id of this process: a reconnect with it is the same client. The server
    is asked to send a message every ``heartbeat_s``.
    """
    wanted = ANY_ID if wanted_id is None else wanted_id
    content = {
        "client_id": wanted,
        "instance": instance,
        "heartbeat_s": heartbeat_s,
        "fingerprint": dict(fingerprint),
    }
    link.send_message_as_json(MessageType.REGISTER, content=content)
    yield link
    return parse_welcome(link, link.receive_message_as_json(MessageType.REGISTERED), wanted)


def parse_welcome(link: Link, reply: Message, wanted: int) -> Welcome:
    """Parse the answer to a client that asked for the id ``wanted``, or ``ANY_ID``.

    Raises:
        ProtocolError: the answer is invalid.
    """
    try:
        run = from_values(RunConfig, reply.get("config", dict), "the server's configuration")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    client = reply.get("client_id", int)
    if client != wanted and wanted != ANY_ID:
        raise ProtocolError(f"the server made us client {client} instead of {wanted}")
    if link.proved_run not in ("", run.run):
        raise ProtocolError(f"the server has proved to have the run {quoted(link.proved_run, 80)}")
    if not run.run or not 0 <= client < run.most_clients:
        raise ProtocolError(f"the server made us client {client} of the run {run.run!r}")
    if not 0 <= (first_round := reply.get("round", int)) <= run.rounds:
        raise ProtocolError(f"the server goes on with round {first_round} of {run.rounds}")
    link.heartbeat_s = parse_heartbeat(reply)
    resumed, fed, version = reply.get("goes_on", bool), reply.get("fed", str), reply.get("sfl", str)
    return Welcome(client, run, first_round, resumed, fed, sfl=one_line(version, 40))


def parse_heartbeat(message: Message) -> float:
    """Return the heartbeat interval in seconds that a peer asks for.

    Raises:
        ProtocolError: it is out of range.
    """
    if not SHORTEST_HEARTBEAT_S <= (seconds := message.get("heartbeat_s", float)) < math.inf:
        raise ProtocolError(f"a heartbeat every {seconds} seconds makes no sense")
    return seconds


def send_report(link: Link, report: DataReport) -> None:
    """Send the report of the loaded data.

    Raises:
        DataError: there are more classes than a report may have.
    """
    if len(report.classes) > MAX_CLASSES:
        raise DataError(f"{len(report.classes)} classes; at most {MAX_CLASSES} can be reported")
    content = dataclasses.asdict(report) | {"classes": [one_line(c, 40) for c in report.classes]}
    link.send_message_as_json(MessageType.REQUEST_TO_START, content=content)


def server_join(
    link: Link,
    welcome: Welcome,
    take_id: Callable[[int, str], int],
    answer_check: Callable[[Message], Conversation[None]],
    *,
    aligns: bool = False,
) -> Conversation[Joined | None]:
    """Register one client and wait until its data are loaded; return None if it only checked.

    ``take_id`` assigns an id, given the wanted one and the client's instance, or raises
    ``RunError`` to refuse the client. The rest of ``welcome`` is the same for all clients.
    ``aligns``: as ``Recipe.aligns``.
    """
    yield link
    hello = link.receive_message_as_json(MessageType.REGISTER, MessageType.CHECK)
    wanted, fingerprint = parse_hello(link, hello)
    if hello.type is MessageType.CHECK:
        yield from answer_check(hello)
        return None
    if not re.fullmatch(r"[0-9a-f]{32}", instance := hello.get("instance", str)):
        raise ProtocolError("a client does not say which process it is")
    link.heartbeat_s = parse_heartbeat(hello)
    client = take_id(wanted, instance)
    link.peer_name = f"client_{client}"
    link.send_message_as_json(MessageType.REGISTERED, content=welcome_content(client, welcome))
    yield link
    message = link.receive_message_as_json(MessageType.REQUEST_TO_START)
    report, ids = parse_report(message, client, welcome.run, aligns=aligns), None
    if aligns:
        ids = yield from server_receive_ids(link, report.num_samples)
    return Joined(client, link, fingerprint, report, ids)


def parse_hello(link: Link, hello: Message) -> tuple[int, Mapping[str, str]]:
    """Return the id that a client asks for, and its fingerprint.

    Raises:
        ProtocolError: its token belongs to another client, or the message is invalid.
    """
    wanted = hello.get("client_id", int)
    link.check_proved(Peer(CLIENT, wanted))
    try:
        return wanted, check_fingerprint(hello.get("fingerprint", dict))
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def welcome_content(client: int, welcome: Welcome) -> dict[str, Any]:
    """Return the content of a client's welcome."""
    return {
        "client_id": client,
        "config": dataclasses.asdict(welcome.run),
        "round": welcome.first_round,
        "goes_on": welcome.resumed or client in welcome.known,
        "fed": welcome.fed,
        "heartbeat_s": welcome.heartbeat_s,
        "sfl": welcome.sfl,
    }


def parse_report(
    message: Message, client: int, run: RunConfig, *, aligns: bool = False
) -> DataReport:
    """Return a client's report, checked; samples that are to be aligned may have any shape.

    Raises:
        ProtocolError: it is invalid.
    """
    try:
        samples = samples_of(message.get("num_samples", dict))
        classes = classes_of(message.get("classes", list))
        shape = shape_of(message.get("input_shape", list))
        digest = digest_of(message.get("digest", str))
    except ValueError as error:
        raise ProtocolError(f"client_{client} reports {error}") from error
    if not aligns:
        _check_fits(run, client, shape, classes)
    counts = message.get("class_counts", list)
    wanted = len(classes) if run.class_weights == BALANCED else 0
    if len(counts) != wanted or not all(type(n) is int and 0 <= n < 2**31 for n in counts):
        raise ProtocolError(f"client_{client} reports no samples of each class")
    rounds = message.get("rounds", list)
    if len(rounds) > MAX_ROUNDS_KEPT or not all(type(r) is int and 0 <= r < 2**31 for r in rounds):
        raise ProtocolError(f"client_{client} reports no list of rounds")
    names = tuple(one_line(name, 40) for name in classes)
    structure, weights = _parse_model_report(message, client)
    return DataReport(
        samples, names, shape, digest, tuple(counts), tuple(rounds), structure, weights
    )


def _parse_model_report(message: Message, client: int) -> tuple[tuple[str, ...], str]:
    """Return the structure and the weights' checksum that a client reports of its model."""
    digests, weights = message.get("structure", list), message.get("weights", str)
    valid = 0 < len(digests) <= MAX_DIGESTS and all(
        type(d) is str and DIGEST.fullmatch(d) for d in digests
    )
    if not valid or not CHECKSUM.fullmatch(weights):
        raise ProtocolError(f"client_{client} does not report which model it has built")
    return tuple(digests), weights


def _check_fits(
    run: RunConfig, client: int, shape: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    """Check shape and number of classes against the run's data set, if this machine knows it.

    The server builds the model for them: an invented shape would decide the model's size.

    Raises:
        ProtocolError: they differ.
    """
    if ":" in run.dataset:
        return
    spec = dataset_of(run)
    is_strip, wanted = run.partition == VERTICAL, spec.input_shape
    wanted = strip_of(wanted, run, client) if is_strip else wanted
    if shape != wanted:
        raise ProtocolError(
            f"client_{client} has samples of shape {list(shape)}; {run.dataset} has {list(wanted)}"
        )
    if run.partition != OWN and len(classes) != len(spec.classes):
        raise ProtocolError(
            f"client_{client} has {len(classes)} classes; {run.dataset} has {len(spec.classes)}"
        )


def describe_data(
    joined: Mapping[int, Joined], recipe: Recipe, order: Ids | None = None
) -> dict[str, Any]:
    """Return the record of the clients' data, after checking that they are compatible.

    ``order``: the samples that all have, where they are aligned.

    Raises:
        RunError: they are not.
        ConfigError: the run's class weights do not match their classes.
    """
    run, reports = recipe.run, {k: client.data for k, client in joined.items()}
    report = reports[run.label_client] if recipe.joins else check_agreement(reports)
    counts = [one.class_counts for k, one in reports.items() if recipe.has_labels(k)]
    described = {
        "input_shape": list(report.input_shape),
        "classes": list(report.classes),
        "class_weights": list(class_weights(run.class_weights, len(report.classes), counts)),
        "num_samples": {
            str(k): aligned_counts(order) if order else dict(one.num_samples)
            for k, one in reports.items()
        },
        "digests": {str(k): one.digest for k, one in reports.items()},
    }
    if recipe.joins:
        described["parts"] = {
            str(k): {"input_shape": list(one.input_shape), "num_classes": len(one.classes)}
            for k, one in reports.items()
        }
    try:
        return data_of(described)  # the check that is made when the record is read
    except ValueError as error:
        raise RunError(f"the clients' data cannot be recorded: {error}") from error


def check_agreement(reports: Mapping[int, DataReport]) -> DataReport:
    """Return one client's report after checking that all have the same classes and shape.

    Raises:
        RunError: they differ; the message names two clients and the difference.
    """
    if odd := disagreeing_clients(reports):
        raise RunError(odd[min(odd)])
    return reports[min(reports)]


def comparable(recipe: Recipe, reports: Mapping[int, DataReport]) -> Mapping[int, DataReport]:
    """Return the reports that must agree: none where each client has its part of each sample."""
    return {} if recipe.joins else reports


def disagreeing_clients(reports: Mapping[int, DataReport]) -> dict[int, str]:
    """Return the clients whose data are incompatible with the majority's, and the difference.

    The largest group of clients that agree stays; of equally large ones, that with the lowest id.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    if not reports:
        return {}
    for k, report in sorted(reports.items()):
        groups.setdefault((report.input_shape, report.classes), []).append(k)
    stay = max(groups.values(), key=len)
    return {k: data_difference(stay[0], k, reports) for k in sorted(reports.keys() - set(stay))}


def data_difference(one: int, other: int, reports: Mapping[int, DataReport]) -> str:
    """Describe why two clients cannot train together; "" if they can."""
    ours, theirs = reports[one], reports[other]
    if theirs.input_shape != ours.input_shape:
        return (
            f"samples differ: client_{other} has shape {list(theirs.input_shape)},"
            f" client_{one} {list(ours.input_shape)}"
        )
    if theirs.classes != ours.classes:
        return (
            f"classes differ: client_{one} has {listed(ours.classes, theirs.classes)},"
            f" client_{other} {listed(theirs.classes, ours.classes)}; all need the same ones,"
            " a folder may be empty"
        )
    return ""
