"""Check that a run can be run, before anything starts."""

import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from sfl.config import RunConfig, flag
from sfl.data.client_data import DatasetSpec, normalised, num_batches
from sfl.data.datasets import dataset_of
from sfl.data.partition import OWN, WRITER
from sfl.data.vertical import strip_of
from sfl.errors import ConfigError, RunError
from sfl.files.torch_file import max_file_bytes, max_state_bytes
from sfl.model.class_weights import BALANCED, class_weights
from sfl.nodes import ServerNode
from sfl.runtime.start_weights import StartWeights
from sfl.strategy.merge import fewest_clients
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import check_model
from sfl.strategy.tasks import addresses_of
from sfl.transport.transports import transport_to
from sfl.weights.stores import SOCKET
from sfl.wire.payload import LARGE_BYTES


def check_run(run: RunConfig, *, imports_data: bool = False) -> Recipe:
    """Return a run's recipe, after trying its model if the data's shape and classes are known.

    ``imports_data``: import a user's own data set for them, if that is possible here; a server does
    not need it.

    Raises:
        ConfigError: the data set is unknown or does not fit the options; as ``Recipe.of``.
    """
    recipe = Recipe.of(run)
    fewest_clients(recipe)  # raises if the rule does not fit
    if spec := _dataset_spec(run, imports_data):
        # A user's own function need not declare that its samples have writers.
        if run.partition == WRITER and not spec.has_writers and ":" not in run.dataset:
            raise ConfigError(
                f"--partition {WRITER}: {run.dataset} does not say who made its samples"
            )
        normalised(spec, run)
        for server in recipe.at_each_server():
            for split in _models(server, server.tasks.seen_by(spec, server.server)):
                check_model(split)
        if run.partition != OWN and run.class_weights != BALANCED:
            class_weights(run.class_weights, len(spec.classes))
    return recipe


def _models(recipe: Recipe, spec: DatasetSpec) -> Collection[SplitModel]:
    """Return the run's model, or each client's, as far as the data's shape tells it."""
    run, shape, num_classes = recipe.run, spec.input_shape, len(spec.classes)
    if recipe.aligns:  # each client's samples may have a shape of their own
        return []
    if not recipe.joins:
        return [SplitModel(recipe, shape, num_classes)]
    models = {
        k: SplitModel(recipe, strip_of(shape, run, k), num_classes, client=k)
        for k in range(run.clients)
    }
    SplitModel(recipe, strip_of(shape, run, run.label_client), num_classes).join(models)
    return models.values()


def check_start(start: StartWeights | None, recipe: Recipe) -> None:
    """Check that a run's model takes these weights, where it is known before clients register.

    Raises:
        ConfigError: it does not.
    """
    run = recipe.run
    if (start or run.init_checksum) and recipe.tasks.names:
        raise ConfigError(f"--init: leave it out with --topology {run.topology}: models differ")
    if start and knows_classes(run) and not recipe.joins:
        spec = dataset_of(run)
        start.fitting(SplitModel(recipe, spec.input_shape, len(spec.classes)))


def knows_classes(run: RunConfig) -> bool:
    """Return whether the classes are known before the clients report theirs."""
    return ":" not in run.dataset and run.partition != OWN


def _dataset_spec(run: RunConfig, imports: bool) -> DatasetSpec | None:
    """Return the spec of a run's data set; None: not known yet."""
    if ":" not in run.dataset:
        return dataset_of(run)
    try:
        return dataset_of(run) if imports else None
    except Exception:  # noqa: BLE001 - a user's own code; reported when the data are loaded
        return None


def disk_bytes(recipe: Recipe, split: SplitModel, num_train: Iterable[int]) -> int:
    """Estimate how many bytes a run writes, from its clients' numbers of training samples."""
    run, row, clients = recipe.run, recipe.scheme, list(num_train)
    front = max_state_bytes(split.front_spec)
    back = max_state_bytes(split.back_spec) if split.cuts else 0
    num_steps = sum(num_batches(count, run.batch_size) for count in clients)
    epoch_bytes = 0
    if row.exchange is Exchange.CUT:
        num_files = 2 * len(split.cuts) + 1
        sample_bytes = recipe.task.label.num_bytes + 2 * split.sample_bytes
        epoch_bytes = sample_bytes * sum(clients) + num_files * num_steps * max_file_bytes([])
    elif row.exchange is Exchange.WEIGHT_GRADS:
        epoch_bytes = num_steps * front
    keep = recipe.keep.tensors
    answers = 0.0  # one round's, kept for repeated steps, if they are not recorded anyway
    if row.exchange is Exchange.WEIGHT_GRADS:
        answers = run.local_epochs * num_steps / max(len(clients), 1) * front
    elif row.exchange is Exchange.CUT and not keep.records_all:
        answers = run.local_epochs * sum(clients) * split.sample_bytes
    num_kept = min(keep.num_kept(run.rounds) + keep.last, run.rounds)  # "last" keeps two for a time
    tensors = run.participation * run.local_epochs * epoch_bytes * num_kept
    num_fronts = 0 if row.fronts is Fronts.OWN else 1 + run.participation * len(clients)
    num_models = recipe.keep.num_kept(run.rounds)
    models = num_models * (front * num_fronts + back)
    if recipe.training.keeps_optimizer:  # up to two more values a parameter, for each copy
        num_backs = len(row.backs_of(range(len(clients))))
        models += 2 * min(num_models, run.rounds) * (back or front) * num_backs
    return round(tensors + models + answers + _incoming_bytes(recipe, split, clients))


def _incoming_bytes(recipe: Recipe, split: SplitModel, num_train: Iterable[int]) -> float:
    """Return the most bytes that large incoming payloads take in unnamed temporary files."""
    run = recipe.run
    front = 0 if recipe.scheme.fronts is Fronts.OWN else max_state_bytes(split.front_spec)
    largest = [max(front, min(count, run.batch_size) * split.sample_bytes) for count in num_train]
    return run.participation * sum(size for size in largest if size >= LARGE_BYTES)


def check_disk(
    folder: Path, recipe: Recipe, bytes_of: Callable[[Recipe], int], *, may_change: bool
) -> str:
    """Return a line that says how much disk the run takes.

    ``may_change``: whether the error may suggest other options; a resumed run cannot change them.

    Raises:
        RunError: the disk has less space.
    """
    free, needed = shutil.disk_usage(folder).free, bytes_of(recipe)
    line = f"the run will take about {_megabytes(needed)} of disk; {_megabytes(free)} are free"
    if needed > free:
        helps = f"give {_suggestion(recipe, bytes_of, free)}or another --out" if may_change else ""
        raise RunError(f"{line}: {helps or 'make space, then go on'}")
    return line


# Options that reduce what is kept on disk, and their values, the smallest last.
_SMALLER = {"keep_tensors": ("last", "none"), "keep_models": ("last",)}


def _suggestion(recipe: Recipe, bytes_of: Callable[[Recipe], int], free: int) -> str:
    """Return options with which the run fits the disk: a single one, if that is enough."""

    def below(recipe: Recipe, name: str, limit: int) -> list[str]:
        return [v for v in _SMALLER[name] if bytes_of(recipe.changed(**{name: v})) <= limit]

    enough = {name: below(recipe, name, free) for name in _SMALLER}
    if texts := [f"{flag(n)} {' or '.join(values)}" for n, values in enough.items() if values]:
        return f"{', '.join(texts)}, "
    for name in _SMALLER:  # no option is enough alone: add them up
        if values := below(recipe, name, bytes_of(recipe) - 1):
            texts.append(f"{flag(name)} {' or '.join(values)}")
            recipe = recipe.changed(**{name: values[-1]})
    return f"{' and '.join(texts)}, " if bytes_of(recipe) <= free else "fewer --rounds, "


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk has space for another round.

    Raises:
        RunError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the next round takes about {_megabytes(needed)} of disk, and"
            f" {_megabytes(free)} are free: make space, then go on"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def check_role(recipe: Recipe, node: ServerNode) -> None:
    """Check that the run can have a separate fed server, if ``--role main`` asks for one.

    Raises:
        ConfigError: it cannot, or the fed server's place is not given.
    """
    if node.role != "main":
        return
    run = recipe.run
    if recipe.joins:
        raise ConfigError(
            f"--role main: with --topology {run.topology} no weights are averaged, so that there is"
            " nothing for a fed server to do"
        )
    if recipe.scheme.exchange is Exchange.WEIGHT_GRADS:
        raise ConfigError(
            f"--role main: in --scheme {run.scheme} the server updates all weights; there is no"
            " fed server to part from"
        )
    for name, given in {"stop_when": run.stop_when, "keep_models": recipe.keep.best_by}.items():
        if given:
            raise ConfigError(
                f"--role main: a fed server apart sees no metrics, which"
                f" {flag(name)} {getattr(run, name)} needs; give both roles to one server"
            )
    if (run.weights == SOCKET) != bool(node.fed_server):
        raise ConfigError(
            "--role main needs to know where the fed server is: give --fed-server HOST:PORT, or"
            " let the weights go through a store, --weights dir:PATH or gs://BUCKET/PREFIX"
        )


_NOT_WITH_FOLLOWERS = ("role", "on_missing")


def check_clients_options(recipe: Recipe, node: ServerNode) -> None:
    """Check the server's options about clients against the run's.

    Raises:
        ConfigError: they do not fit.
    """
    run = recipe.run
    for given in node.given(_NOT_WITH_FOLLOWERS) if recipe.has_followers else ():
        raise ConfigError(
            f"{given}: leave it out with --topology {run.topology}, whose parties need all clients"
        )
    wanted, told = list(recipe.tasks.names[1:]), addresses_of(node.task_servers)
    if sorted(told) != sorted(wanted) or not all(told.values()):
        form = ",".join(f"{name}=HOST:PORT" for name in wanted) or "without --topology multi-task"
        given, verb = node.task_servers or "(none)", "give" if wanted else "leave it out"
        raise ConfigError(f"--task-servers {given}: {verb} {form}")
    for address in told.values():
        transport_to(address)  # a bad address fails at once
    if node.min_clients > run.most_clients:
        raise ConfigError(f"--min-clients {node.min_clients}: there are {run.most_clients}")
    if node.at_once and len(recipe.scheme.backs_of(range(run.most_clients))) < run.most_clients:
        raise ConfigError(
            f"--at-once {node.at_once}: with {run.scheme} not every client has a copy of the back"
        )
