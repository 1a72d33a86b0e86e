"""Whether a run can be run at all: said before anything starts."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from sfl.augment import check_augmentation
from sfl.class_weights import BALANCED, class_weights, parse
from sfl.config import KeepTensors, RunConfig
from sfl.data import DatasetSpec, normalised, num_batches, parse_normalize
from sfl.datasets import dataset_of
from sfl.errors import ConfigError, RunError
from sfl.optimizers import check_optimizer
from sfl.outcome import check_rule
from sfl.partition import OWN, WRITER, check_partition
from sfl.payload import LARGE_BYTES
from sfl.schedule import check_schedule
from sfl.schemes import Exchange, Fronts, scheme
from sfl.split_model import SplitModel, resolve_cut
from sfl.start_check import check_model
from sfl.stores import check_address
from sfl.tensors import max_file_bytes, max_state_bytes


def check_run(run: RunConfig, *, imports_data: bool = False) -> RunConfig:
    """Return the run with its cut and its schedule's length filled in, after checking its names.

    The model is tried where the data's shape and classes are known. ``imports_data``: a data set
    that is a user's own function is asked for them, if it can be imported here; a server does
    without it.

    Raises:
        ConfigError: there is no such scheme, model, cut, data set, partition, optimiser, schedule,
            aggregation rule or store.
    """
    check_names(run)
    check_partition(run)
    check_rule(run)
    parse(run.class_weights)
    check_augmentation(run.augment)
    if run.normalize:
        parse_normalize(run.normalize)
    if spec := _data_of(run, imports_data):
        # A user's own function need not say that its samples have writers.
        if run.partition == WRITER and not spec.has_writers and ":" not in run.dataset:
            raise ConfigError(
                f"--partition {WRITER}: {run.dataset} does not say who made its samples"
            )
        normalised(spec, run)
        check_model(SplitModel(run, spec.input_shape, len(spec.classes)))
        if run.partition != OWN and run.class_weights != BALANCED:
            class_weights(run.class_weights, len(spec.classes))
    return dataclasses.replace(run, cut=resolve_cut(run), lr_rounds=run.lr_rounds or run.rounds)


def knows_classes(run: RunConfig) -> bool:
    """Say whether the classes are known before the clients have reported theirs."""
    return ":" not in run.dataset and run.partition != OWN


def _data_of(run: RunConfig, imports: bool) -> DatasetSpec | None:
    """Return what is known of a run's data set; None: nothing yet."""
    if ":" not in run.dataset:
        return dataset_of(run)
    try:
        return dataset_of(run) if imports else None
    except Exception:  # noqa: BLE001 - a user's own; whoever loads the data says what is wrong
        return None


def check_names(run: RunConfig) -> None:
    """See that this installation has what the run names, for whoever trains in it.

    Raises:
        ConfigError: there is no such scheme, optimiser, schedule or store.
    """
    scheme(run.scheme)
    check_optimizer(run.optimizer)
    check_schedule(run)
    check_address(run.weights)


def disk_bytes(run: RunConfig, split: SplitModel, num_train: Iterable[int]) -> int:
    """Return about how many bytes a run will write, from its clients' training samples."""
    row, clients = scheme(run.scheme), list(num_train)
    front = max_state_bytes(split.front_spec)
    back = max_state_bytes(split.back_spec) if split.cuts else 0
    num_steps = sum(num_batches(count, run.batch_size) for count in clients)
    an_epoch = 0
    if row.exchange is Exchange.CUT:
        a_sample = split.labels_spec(1).num_bytes + 2 * split.features_spec(1).num_bytes
        an_epoch = a_sample * sum(clients) + 3 * num_steps * max_file_bytes([])
    elif row.exchange is Exchange.WEIGHT_GRADS:
        an_epoch = num_steps * front
    keep = KeepTensors.parse(run.keep_tensors)
    answers = 0.0  # of one round, for whoever redoes it, where they are not recorded anyway
    if row.exchange is Exchange.WEIGHT_GRADS:
        answers = run.local_epochs * num_steps / max(len(clients), 1) * front
    elif row.exchange is Exchange.CUT and not keep.records_all:
        answers = run.local_epochs * sum(clients) * split.features_spec(1).num_bytes
    num_kept = min(keep.num_kept(run.rounds) + keep.last, run.rounds)  # "last" drops one late
    tensors = run.participation * run.local_epochs * an_epoch * num_kept
    num_fronts = 0 if row.fronts is Fronts.OWN else 1 + run.participation * len(clients)
    models = (run.rounds + 1) * (front * num_fronts + back)
    if run.optimizer_state == "keep":  # up to two more values a parameter, for each copy
        num_backs = len({row.back_of(k) for k in range(len(clients))})
        models += 2 * run.rounds * (back or front) * num_backs
    return round(tensors + models + answers + _coming_bytes(run, split, clients))


def _coming_bytes(run: RunConfig, split: SplitModel, num_train: Iterable[int]) -> float:
    """Return how much, at most, lies in files without a name while it comes in."""
    row = scheme(run.scheme)
    front = 0 if row.fronts is Fronts.OWN else max_state_bytes(split.front_spec)
    largest = [
        max(front, split.features_spec(min(count, run.batch_size)).num_bytes if split.cuts else 0)
        for count in num_train
    ]
    return run.participation * sum(size for size in largest if size >= LARGE_BYTES)


def check_disk(folder: Path, needed: int) -> str:
    """Return a line that says how much disk the run takes.

    Raises:
        RunError: there is less.
    """
    free = shutil.disk_usage(folder).free
    line = f"the run will take about {_megabytes(needed)} of disk; {_megabytes(free)} are free"
    if needed > free:
        raise RunError(f"{line}: give --keep-tensors last or none, or another --out")
    return line


def check_space(folder: Path, needed: int) -> None:
    """See that the disk holds another round.

    Raises:
        RunError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the next round takes about {_megabytes(needed)} of disk, and"
            f" {_megabytes(free)} are free: make space, then go on"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
