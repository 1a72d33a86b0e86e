"""``sfl-predict``: the predictions of a trained model for samples of one's own.

::

    sfl-predict RUN images...                                  the joined model, here
    sfl-predict --server HOST:PORT --front FILE images...      cut tensors alone leave this machine
    ... --test-of RUN                                          the run's test samples instead
"""

import contextlib
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from sfl.archive.run_folder import say
from sfl.config import flag
from sfl.environment import set_up_torch
from sfl.errors import ConfigError, after_round
from sfl.interactive.run import Run
from sfl.model.metrics import Tally, add_up
from sfl.nodes import ClientNode
from sfl.options import from_values, names_of
from sfl.trained.inputs import Batch, Files, TestSet
from sfl.trained.models import Model, RunsModel, ServedModel, run_of, served
from sfl.trained.predictions import MOST_SHOWN, Predictions

OF_A_RUN = ("threads", "data_dir", "cache_dir", "allow_import")
OF_A_DATA_SET = ("data_dir", "cache_dir")
OF_A_SERVER = (
    "connect_timeout", "peer_timeout", "token_file", "tls_ca", "tls_cert", "tls_key", "link",
    "memory_limit",
)  # fmt: skip


def predict(options: Namespace) -> None:
    """Print the predictions that the command line asks for.

    Raises:
        ConfigError: the options do not fit together.
        DataError: a sample cannot be read, or is none for this model.
        SflError: the run, the front or the server cannot be used.
    """
    typed = {n: v for n, v in vars(options).items() if n in names_of(ClientNode)}
    node = from_values(ClientNode, typed, "the options")
    machine = {name: value for name, value in typed.items() if name in OF_A_RUN}
    _check(options, is_served="server" in typed)
    _check_used(typed, "" if "server" in typed else "--server", OF_A_SERVER)
    _check_used(typed, "" if options.test_of else "--test-of", OF_A_DATA_SET)
    device = set_up_torch(node)  # a run that is opened sets its own threads, if none are typed
    tested = run_of(options.test_of, machine) if options.test_of else None
    recorded = tested.rounds if tested and options.client is None else None
    with contextlib.ExitStack() as stack:
        if "server" in typed:
            paths = options.paths
            files = options.front.split(",")
            model: Model = stack.enter_context(served(files, node, device))
        else:
            first, *paths = options.paths
            run = run_of(first, machine)
            model = RunsModel(run, options.round, options.client, device)
        if tested:
            clients = tested.client_ids if options.client is None else [options.client]
            groups: Sequence[Iterable[Batch]] = [TestSet(tested, k) for k in clients]
        else:
            groups = [Files([Path(path) for path in paths], model.expected, say)]
        found, tally = _predicted(model, groups)
    _show(found, tally, options.csv)
    if not tested and (warning := found.how_strange()):
        say(warning)
    if tested and recorded is not None:
        _compare(tested, recorded, options.round, found, tally)
    if isinstance(model, ServedModel):
        say(model.traffic())


def _check(options: Namespace, *, is_served: bool) -> None:
    """Check what the command line names.

    Raises:
        ConfigError: something is missing, or does not belong together.
    """
    runs = 0 if is_served else 1
    if len(options.paths) < runs:
        raise ConfigError("give a run's folder, or --server HOST:PORT and --front FILE")
    if is_served != bool(options.front):
        raise ConfigError("--server and --front: give both, or a run's folder instead")
    if is_served and options.round is not None:
        raise ConfigError("--round: the server and the front say which round it is")
    if (len(options.paths) > runs) == bool(options.test_of):
        raise ConfigError("give images, a folder of them or an .npz file; or --test-of RUN")
    _check_csv(options.csv)
    if is_served and options.client is not None and not options.test_of:
        raise ConfigError("--client: the front says whose it is; with --test-of, whose samples")


def _check_used(typed: Collection[str], lacking: str, names: Sequence[str]) -> None:
    """Check that no option is given that only one that is lacking has a use for.

    Raises:
        ConfigError: there is one.
    """
    if lacking and (idle := [flag(name) for name in names if name in typed]):
        raise ConfigError(f"{', '.join(idle)}: only {lacking} has a use for this; leave it out")


def _check_csv(csv: str) -> None:
    if csv and Path(csv).is_dir():
        raise ConfigError(f"--csv {csv}: is a folder; give a file in it")
    if csv and not Path(csv).parent.is_dir():
        raise ConfigError(f"--csv {csv}: there is no folder {Path(csv).parent}")


def _predicted(model: Model, groups: Sequence[Iterable[Batch]]) -> tuple[Predictions, Tally]:
    """Predict all samples; each group's figures are added up by themselves, then those of all."""
    found = Predictions(model.task, model.expected.spec.classes)

    def tallies(group: Iterable[Batch]) -> Iterator[Tally]:
        for batch in group:
            yield found.add(batch, model.outputs(batch.x))

    return found, add_up([add_up(tallies(group)) for group in groups])


def _show(found: Predictions, tally: Tally, csv: str) -> None:
    say(found.table())
    if csv:
        found.write(Path(csv))
        say(f"all {len(found.rows)} predictions lie in {csv}")
    elif len(found.rows) > MOST_SHOWN:
        say(f"... and {len(found.rows) - MOST_SHOWN} more: --csv FILE writes all")
    if tally.samples:
        metric, title = found.task.shown
        figures = found.task.figures(tally, "test")
        say(
            f"{title} {figures[f'test_{metric}']:.4f}, loss {figures['test_loss']:.4f}, over"
            f" {tally.samples} samples whose class is known"
        )


def _compare(
    run: Run, rounds: pd.DataFrame, round_index: int | None, found: Predictions, tally: Tally
) -> None:
    """Say whether the figures are those that the run has recorded, in its ``rounds``."""
    figures = found.task.figures(tally, "test")
    names = [f"test_{name}" for name in found.task.trained]
    last = run.last_round(round_index)
    recorded = rounds[rounds["round"] == last].dropna(axis="columns")
    theirs = {n: float(recorded[n].iloc[0]) for n in names if n in recorded and len(recorded)}
    ours = {name: figures[name] for name in names if name in figures}
    told = ", ".join(f"{name} {value!r}" for name, value in ours.items())
    if ours == theirs:
        say(f"{told}: exactly as in rounds.csv of {run.path}")
    elif not theirs:
        say(f"{told}; {run.path} has no test figures {after_round(last)}")
    else:
        others = ", ".join(f"{name} {value!r}" for name, value in theirs.items())
        say(f"{told}; rounds.csv of {run.path} has {others}")
