"""A client: connect, register, load the data, take part in the rounds."""

from collections.abc import Callable
from pathlib import Path

import torch

from sfl.check import check_names
from sfl.client_store import hearing_why, open_store, reach
from sfl.config import ClientNode, RunConfig
from sfl.conversation import client_run
from sfl.data import ClientData, Source, load, num_batches, part_of
from sfl.datasets import dataset_of
from sfl.driver import run_blocking
from sfl.environment import command_line, describe, fingerprint, set_up_torch
from sfl.errors import RunError
from sfl.own_data import load_own
from sfl.partition import OWN
from sfl.party import ClientParty
from sfl.registration import DataReport, Welcome, client_join, send_report
from sfl.resume import check_same_run, load_front
from sfl.roundlog import ClientLog
from sfl.runfolder import RunFolder, open_folder, options_record, telling_why, to_json
from sfl.split_model import SplitModel
from sfl.tensors import max_file_bytes
from sfl.transport import Connection, parse_address


def take_part(node: ClientNode) -> None:
    """Take part in one run as a client.

    Raises:
        ConfigError, DataError: the run's configuration or data cannot be had here.
        RunError: no server, or a folder that cannot be written.
        PeerFailed: the server turned us away or ended the run, and says why.
        ProtocolError, IntegrityError, ConnectionLost: from the server.
    """
    parse_address(node.server)  # before torch's own start
    device = set_up_torch(node)
    with reach(node.server, node) as connection:
        connection.peer_name = "server"
        with hearing_why(connection):
            joining = client_join(connection, node.client_id, fingerprint(device))
            welcome = run_blocking(joining)
            run, connection.name = welcome.run, f"client_{welcome.client}"
            path = node.out_path / "client" / run.run / connection.name
            _create_folder(path, goes_on=welcome.goes_on)
            if welcome.goes_on:
                check_same_run(path, run)
            with open_folder(path, "client_log.txt", node.keep_tensors) as folder:
                folder.events.say(f"{connection.name} of run {run.run} at {node.server}")
                folder.archive.write("config", "config.json", to_json(options_record(run, node)))
                environment = describe(device, command_line())
                folder.archive.write("environment", "environment.json", to_json(environment))
                with telling_why(folder.events):
                    _run(connection, welcome, node, folder, device)


def _create_folder(path: Path, *, goes_on: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=goes_on)
    except FileExistsError:
        raise RunError(
            f"{path} exists: another client of this run wrote there; give another --out"
        ) from None
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror}; see --out") from error


def load_data(
    run: RunConfig, client: int, node: ClientNode, notify: Callable[[str], None]
) -> ClientData:
    """Return what this client trains, validates and tests on.

    Raises:
        ConfigError, DataError: the data set is not known, not allowed, or not there.
    """
    spec = dataset_of(run, node.allowed_imports)
    if run.partition == OWN:
        return load_own(spec, run, client, node.data_path)
    source = Source(node.data_path, node.cache_path, spec.input_shape, notify)
    return part_of(spec, run, client, load(spec, source))


def _run(
    connection: Connection,
    welcome: Welcome,
    node: ClientNode,
    folder: RunFolder,
    device: torch.device,
) -> None:
    events, allowed = folder.events, node.allowed_imports
    client, run, first_round = welcome.client, welcome.run, welcome.first_round
    check_names(run)
    data = load_data(run, client, node, events.say)
    split = SplitModel(run, data.input_shape, len(data.classes), allowed)
    connection.limits = split.client_limits()
    report = DataReport.of(data, run)
    counts = ", ".join(f"{count} {part}" for part, count in report.num_samples.items())
    events.say(f"{counts} samples; {run.model} cut at {split.cut}, on {device}")
    front = split.front(device)
    if first_round:
        load_front(folder.path, front, run, client, first_round)
    log = ClientLog(run, folder, num_batches(len(data.train), run.batch_size))
    with open_store(
        connection,
        welcome,
        node,
        folder,
        report,
        fingerprint(device),
        max_file_bytes(split.front_spec.values()),
    ) as (store, fed):
        if fed is not None:
            fed.limits = split.client_limits()
        send_report(connection, report)
        party = ClientParty(
            client=client,
            run=run,
            link=connection,
            weights=store,
            split=split,
            archive=folder.archive,
            watcher=log,
            front=front,
            data=data,
            on_round=log.end_round,
            first_round=first_round,
        )
        try:
            run_blocking(client_run(party))
        finally:
            log.progress.close()
    events.say(f"the run is over; this client's log lies in {folder.path}")
