"""``experiments.web``: the servers of one run for browsers, started and ended together.

::

    browser  <- HTTP, WebSocket ->  site  <- TCP, this machine alone ->  the back's service
                                          <- TCP, TLS, token ->          the server of --train
"""

import contextlib
import importlib.util
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from experiments.web import templates, training
from experiments.web.behind import service_of, trainer_of
from experiments.web.decoder_process import NONE, DecoderProcess
from experiments.web.doors import BoundedListener, Doors
from experiments.web.model_files import ModelFiles
from experiments.web.pages import INSTALL, Pages, Route, has_runtime
from experiments.web.site import Parts, Site
from sfl.archive.run_folder import say
from sfl.environment import set_up_torch
from sfl.errors import ConfigError, RunError, SflError, not_installed, quoted, reason_of
from sfl.interactive.run import open_run
from sfl.nodes import HOST, ClientNode, ServerNode
from sfl.reports.watch_state import run_folder
from sfl.trained.service import Service, open_service
from sfl.transport.addresses import format_address, is_loopback
from sfl.transport.certificates import server_tls
from sfl.transport.refusal_log import RefusalLog

LOOK_S = 0.2  # interval of looking whether a server has ended
END_WITHIN_S = 5.0
_OF_RUN = ("threads", "data_dir", "cache_dir", "allow_import")
_OF_SERVICE = ("threads", "device", "data_dir", "cache_dir", "memory_limit", "peer_timeout",
               "allow_import")  # fmt: skip


def serve_site(options: Namespace, node: ServerNode, to_train: ClientNode) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: the options do not fit together, or a page cannot use such a run.
        RunError: there is no such run, the port is in use, or a server has failed.
    """
    check_packages()
    check_names(options.names)
    check_exposure(node, to_train, options.train)
    refusals = RefusalLog(say)
    with BoundedListener.on(node.host, node.port, refusals) as listener:  # before what takes long
        _serve_at(listener, refusals, options, node, to_train)


def _serve_at(
    listener: BoundedListener,
    refusals: RefusalLog,
    options: Namespace,
    node: ServerNode,
    to_train: ClientNode,
) -> None:
    files, tls = chosen_files(options, node), server_tls(node)
    path = files.run.path
    serves = ServerNode(serve=str(path), port=0, **{n: getattr(node, n) for n in _OF_SERVICE})
    doors = Doors(node.host, options.names, is_tls=tls is not None)
    behind = {"/train": trainer_of(options.train, to_train)} if options.train else {}
    decoding = decoder_of(path, node, options)
    with open_service(serves) as service, _running(service, serves) as ended, decoding as decoder:
        behind["/predict"] = service_of(service.address)
        pages = Pages(routes_of(files, decoder, options.train, to_train), say)
        parts = Parts(pages, behind, doors, tls.context if tls else None)
        with Site(parts, listener, refusals) as site:
            for line in told(node, options, site.port, files):
                say(line)
            _wait(site, ended)


def routes_of(
    files: ModelFiles, decoder: DecoderProcess | None, train: str, to_train: ClientNode
) -> Mapping[str, Route]:
    """Return the routes of all parts; ``train`` is the address of a server that trains, or ""."""

    def more() -> Mapping[str, object]:
        return {"train": bool(train), "decoder": decoder.state if decoder else NONE}

    found = files.routes(more) | templates.routes() | (decoder.routes() if decoder else {})
    return found | training.routes(train, to_train) if train else found


def decoder_of(
    path: Path, node: ServerNode, options: Namespace
) -> contextlib.AbstractContextManager[DecoderProcess | None]:
    """Return what makes the decoder in the background; nothing with ``--no-decoder``."""
    if options.no_decoder:
        return contextlib.nullcontext()
    return DecoderProcess(path, node, options.client)


def chosen_files(options: Namespace, node: ServerNode) -> ModelFiles:
    """Return the files of the run that is named, or of the newest that a page can use.

    Raises:
        ConfigError, RunError, IntegrityError: there is none; of several that a page cannot use, the
            newest one's reason.
    """
    machine = {name: getattr(node, name) for name in _OF_RUN}
    shares = is_loopback(node.host) or options.share_samples

    def files_of(path: Path) -> ModelFiles:
        run = open_run(path, **machine)
        return ModelFiles(run, node, options.client, shares_samples=shares)

    if options.run:
        return files_of(run_folder(options.run, node.out_path))
    passed_over: list[tuple[Path, SflError]] = []
    for path in finished_runs(node.out_path):
        try:
            found = files_of(path)
        except SflError as error:
            passed_over.append((path, error))
            continue
        for newer, why in passed_over:
            say(f"newer, but not for a page: {newer.name}: {reason_of(why)}")
        return found
    if passed_over:
        raise passed_over[0][1]
    raise RunError(
        f"there is no finished run in {node.out_path / 'server'}: make one, for example with python"
        " -m experiments.demo, or give a run's folder; --train needs one too, for the predictions"
    )


def finished_runs(out: Path) -> Iterator[Path]:
    """Yield the folders of the server's runs that have a finished round, the newest first."""
    dated = []
    for table in (out / "server").glob("*/rounds.csv"):
        with contextlib.suppress(OSError):  # just removed
            dated.append((table.stat().st_mtime_ns, table.parent))
    for _, path in sorted(dated, reverse=True):
        yield path


def check_packages() -> None:
    """Check that a model's files can be made.

    Raises:
        ConfigError: a package is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise not_installed(package)


def check_names(names: Iterable[str]) -> None:
    """Check that names are those of hosts.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if not HOST.fullmatch(name):
            raise ConfigError(f"--name {quoted(name)}: is no host's name: give it without a port")


def check_exposure(node: ServerNode, to_train: ClientNode, train: str) -> None:
    """Check that strangers reach nothing by mistake.

    Raises:
        ConfigError: they could.
    """
    if not train and (given := [n for n in ("token_file", "tls_ca") if getattr(to_train, n)]):
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{flags}: is for the server of --train HOST:PORT: give both")
    if is_loopback(node.host) or node.insecure:
        return
    if train and to_train.token_file:
        raise ConfigError(
            f"--host {node.host}: whoever reaches the port could take part in the run of --train"
            " with this machine's token: give --insecure if only trusted people reach it"
        )
    if not node.tls_cert:
        raise ConfigError(
            f"--host {node.host}: others on the way could read and alter what travels: give"
            " --tls-cert and --tls-key, or --insecure if only trusted people reach it"
        )


def told(node: ServerNode, options: Namespace, port: int, files: ModelFiles) -> Iterator[str]:
    """Yield what the user is told at the start."""
    scheme = "https" if node.tls_cert else "http"
    is_local = is_loopback(node.host)
    host = options.names[0] if options.names else node.host
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    run = files.run
    if not has_runtime():
        yield f"warning: pages cannot compute yet: the inference runtime is missing: {INSTALL}"
    if not is_local:
        yield "warning: whoever reaches the port can ask for predictions, and has the model"
        if files.shares_samples:
            yield "warning: --share-samples: they have the test samples of the run's data set, too"
        if not options.no_decoder:
            yield (
                "warning: they have a decoder that was trained on test samples of the run's data"
                " set: --no-decoder leaves it out"
            )
        if not node.tls_cert:
            yield "warning: no --tls-cert: others on the way can read and alter what travels"
    yield (
        f"run {run.config.run}, as after round {run.last_round() + 1} of {run.config.rounds}"
        f" ({run.config.model}): open {scheme}://{format_address(host, port)}/ in a browser"
    )


@contextlib.contextmanager
def _running(service: Service, node: ServerNode) -> Iterator[threading.Event]:
    """Run the service in a thread; the event is set when it has ended."""
    stop, ended = threading.Event(), threading.Event()

    def run() -> None:
        try:
            set_up_torch(node)  # the number of its threads is this thread's own
            service.run(stop.is_set)
        except SflError as error:
            say(f"the service of the back has failed: {reason_of(error)}")
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="service", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        stop.set()
        thread.join(END_WITHIN_S)


def _wait(site: Site, ended: threading.Event) -> None:
    """Wait for an interrupt.

    Raises:
        RunError: a server has ended by itself.
    """
    while not ended.wait(LOOK_S):
        site.check()
    raise RunError("the service of the back has ended: start the site again")
