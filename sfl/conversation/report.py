"""What a client reports of its data and model: made, sent, checked, and compared with others'."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfl.archive.records import MAX_CLASSES, classes_of, data_of, digest_of, samples_of, shape_of
from sfl.config import RunConfig
from sfl.data.class_names import listed
from sfl.data.client_data import ClientData
from sfl.data.datasets import dataset_of
from sfl.data.label_tasks import classes_of_tasks
from sfl.data.partition import OWN, VERTICAL
from sfl.data.vertical import strip_of
from sfl.errors import DataError, ProtocolError, RunError
from sfl.model.class_weights import BALANCED, class_weights
from sfl.model.structure import CHECKSUM, DIGEST, MAX_DIGESTS
from sfl.strategy.recipe import Recipe
from sfl.wire.link import Link, one_line
from sfl.wire.messages import Message, MessageType

MAX_ROUNDS_KEPT = 16
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
    tells_classes: bool = True  # whether its evaluations tell figures of each class

    @classmethod
    def of(
        cls,
        data: ClientData,
        run: RunConfig,
        *,
        keeps_labels: bool = False,
        shares_figures: bool = False,
        passes_hops: bool = False,
    ) -> "DataReport":
        """``keeps_labels``: nothing of the labels may be told, not even a hash.

        ``passes_hops``: hops read the report, and may not be told a hash of the labels either.

        ``shares_figures``: those of each class are told all the same.
        """
        digest = hashlib.sha256(run.run.encode())
        at_once = max(HASHED_BYTES // (4 * math.prod(data.input_shape)), 1)
        for samples in (data.train, data.validation, data.test):
            for rows in torch.split(torch.arange(len(samples)), at_once):
                digest.update(samples.take(rows).x.numpy().tobytes())
            if not (keeps_labels or passes_hops):
                digest.update(samples.y.numpy().tobytes())
        for ids in data.identified.ids.values() if data.identified else ():
            digest.update(ids.numpy().tobytes())
        class_counts: list[int] = []
        if run.class_weights == BALANCED:
            class_counts = torch.bincount(data.train.y, minlength=len(data.classes)).tolist()
        return cls(
            data.num_samples,
            data.classes,
            data.input_shape,
            digest.hexdigest(),
            tuple(class_counts),
            tells_classes=shares_figures or not keeps_labels,
        )

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> "DataReport":
        """Return the report that ``asdict`` made a table of JSON of."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)


def send_report(link: Link, report: DataReport, seal: str = "") -> None:
    """Send the report of the loaded data; ``seal``: our public key, where hops stand in between.

    Raises:
        DataError: there are more classes than a report may have.
    """
    if len(report.classes) > MAX_CLASSES:
        raise DataError(f"{len(report.classes)} classes; at most {MAX_CLASSES} can be reported")
    content = dataclasses.asdict(report) | {"classes": [one_line(c, 40) for c in report.classes]}
    content |= {"seal": seal} if seal else {}
    link.send_message_as_json(MessageType.REQUEST_TO_START, content=content)


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
    if not are_rounds(rounds):
        raise ProtocolError(f"client_{client} reports no list of rounds")
    names = tuple(one_line(name, 40) for name in classes)
    structure, weights = _parse_model_report(message, client)
    tells_classes = message.get("tells_classes", bool)
    return DataReport(
        samples, names, shape, digest, tuple(counts), tuple(rounds), structure, weights,
        tells_classes,
    )  # fmt: skip


def are_rounds(values: Sequence[object]) -> bool:
    """Return whether a peer's list is one of rounds that its checkpoints are of."""
    few = len(values) <= MAX_ROUNDS_KEPT
    return few and all(type(r) is int and 0 <= r < 2**31 for r in values)


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
    if run.partition == OWN:
        return
    if len(classes) not in map(len, classes_of_tasks(run.tasks, spec.classes).values()):
        raise ProtocolError(
            f"client_{client} has {len(classes)} classes; {run.dataset} has {len(spec.classes)}"
        )


def describe_data(reports: Mapping[int, DataReport], recipe: Recipe) -> dict[str, Any]:
    """Return the record of the clients' data, after checking that they are compatible.

    Raises:
        RunError: they are not.
        ConfigError: the run's class weights do not match their classes.
    """
    run = recipe.run
    report = check_agreement(reports, recipe)
    counts = [one.class_counts for k, one in reports.items() if recipe.has_labels(k)]
    described = {
        "input_shape": list(report.input_shape),
        "classes": list(report.classes),
        "class_weights": list(class_weights(run.class_weights, len(report.classes), counts)),
        "num_samples": {str(k): dict(one.num_samples) for k, one in reports.items()},
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


def check_agreement(reports: Mapping[int, DataReport], recipe: Recipe | None = None) -> DataReport:
    """Return one client's report after checking that all can train together.

    Raises:
        RunError: they cannot; the message names two clients and the difference.
    """
    if odd := disagreeing_clients(reports, recipe):
        raise RunError(odd[min(odd)])
    return reports[recipe.leader(min(reports)) if recipe else min(reports)]


def disagreeing_clients(
    reports: Mapping[int, DataReport], recipe: Recipe | None = None
) -> dict[int, str]:
    """Return the clients whose data are incompatible with the majority's, and the difference.

    The largest group of clients that agree stays; of equally large ones, that with the lowest id.
    """
    groups: list[list[int]] = []
    for k in sorted(reports):
        alike = (g for g in groups if not data_difference(g[0], k, reports, recipe))
        if (group := next(alike, None)) is None:
            groups.append(group := [])
        group.append(k)
    stay = max(groups, key=len, default=[])
    return {
        k: data_difference(stay[0], k, reports, recipe) for k in sorted(reports.keys() - set(stay))
    }


def data_difference(
    one: int, other: int, reports: Mapping[int, DataReport], recipe: Recipe | None = None
) -> str:
    """Describe why two clients cannot train together; "" if they can.

    Their samples are of the same kind; or the same samples, of which each has a part.
    """
    ours, theirs = reports[one], reports[other]
    if recipe and recipe.joins:
        if recipe.aligns or theirs.num_samples == ours.num_samples:
            return ""
        return (
            f"samples differ: client_{other} has {_counts(theirs)},"
            f" client_{one} {_counts(ours)}; all need the same ones, of which each has its part"
        )
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


def _counts(report: DataReport) -> str:
    return ", ".join(f"{count} {part}" for part, count in report.num_samples.items())
