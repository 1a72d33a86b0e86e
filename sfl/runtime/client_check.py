"""``run_client.py --check``: try what a client needs, and print one line for each result.

The client is not registered, nothing is written, and a run in progress is not affected.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sfl import __version__
from sfl.archive.run_folder import say
from sfl.config import RunConfig
from sfl.conversation.check import Answer, client_check
from sfl.conversation.join import APART, HERE, Welcome
from sfl.conversation.report import DataReport
from sfl.data.client_data import ClientData
from sfl.environment import Devices, fingerprint
from sfl.errors import ConfigError, ProtocolError, Redirected, RunError, SflError, reason_of
from sfl.nodes import ClientNode
from sfl.runtime.access import Access, allowed_address
from sfl.runtime.client_process import ClientProcess, devices_of, recipe_of
from sfl.runtime.preflight import check_disk, disk_bytes
from sfl.runtime.resume import own_state_rounds
from sfl.runtime.same_model import report_of
from sfl.runtime.task_servers import at_each_server
from sfl.strategy.merge import has_client_state
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.tokens import SERVER
from sfl.transport.transports import Transport, transport_to
from sfl.weights.stores import SOCKET, StoreOptions
from sfl.wire.driver import run_blocking
from sfl.wire.link import ANY_ID, CLIENT, Peer, one_line
from sfl.wire.members import Channel

T = TypeVar("T")
OK, NOT_OK, NOT_CHECKED = "ok", "NOT OK", "not checked"


def check(node: ClientNode) -> int:
    """Check each client of a node; return 0 if all checks pass, else 1."""
    ids: list[int | None] = [*node.hosted] or [node.client_id]
    found = []
    for k in ids:
        with contextlib.ExitStack() as stack:
            own = dataclasses.replace(node, client_id=k, client_ids="")
            found.append(_Check(own, transport_to(own.server), stack).run(node))
    return 0 if all(found) else 1


class _Check:
    """The check for one client."""

    def __init__(self, node: ClientNode, transport: Transport, stack: contextlib.ExitStack) -> None:
        self._node, self._transport, self._stack = node, transport, stack
        self._all_ok = True

    def _say(self, state: str, what: str, text: str) -> None:
        self._all_ok &= state != NOT_OK
        say(f"{state + ':':13}{what}: {one_line(text, 2000)}")

    def _try(self, what: str, attempt: Callable[[], tuple[T, str]]) -> T | None:
        """Run an attempt that returns a value and a text; print its result."""
        try:
            value, text = attempt()
        except Exception as error:  # noqa: BLE001 - may run a user's own code
            self._say(NOT_OK, what, reason_of(error))
            return None
        self._say(OK, what, text)
        return value

    def run(self, whole: ClientNode) -> bool:
        """Run all checks; return whether all pass. ``whole``: the node of all hosted clients."""
        devices = self._try("device", lambda: _devices(whole))
        access = self._access()
        process = ClientProcess(access, devices, whole.hosted) if devices and access else None
        answer = self._ask(process) if process else None
        if process is not None and answer is not None:
            self._check_run(process, answer.welcome)
            for name, address in answer.welcome.task_servers.items():
                self._try(f"server of {name}", functools.partial(self._reach, process, address))
            return self._all_ok
        for what in ("data", "model"):
            self._say(NOT_CHECKED, what, "which run it is, only the server says")
        self._try("disk", lambda: _writable(self._node.out_path))
        return self._all_ok

    def _reach(self, process: ClientProcess, address: str) -> tuple[bool, str]:
        with process.access.connect(address, self._node):
            return True, f"{address} answers"

    def _ask(self, process: ClientProcess) -> Answer | None:
        """Ask the server, or the process of it that serves this client."""
        ask = functools.partial(self._ask_which_run, process)
        try:
            return process.access.follow(self._node.server, ask)
        except ProtocolError as error:
            self._say_error("run", error)
            return None

    def _ask_which_run(self, process: ClientProcess, address: str) -> Answer | None:
        """Ask the server at an address for the run's configuration."""
        self._node = dataclasses.replace(self._node, server=address)
        tokens, ours = process.access.tokens, fingerprint(process.devices[0])
        link = self._try("address", lambda: self._connect(process))
        if link is None:
            return None
        with link:
            if tokens and not self._try("token", lambda: self._authenticate(process, link)):
                return None
            try:
                answer = run_blocking(client_check(link, self._wanted_id(process), ours, None))
            except Redirected:
                raise
            except SflError as error:
                self._say_error("run", error)
                return None
        self._node = dataclasses.replace(self._node, client_id=answer.welcome.client)
        if not tokens:
            self._say(OK, "token", "the server asks for none")
        self._say(OK, "run", f"{answer.welcome.run.run}, of SFL {answer.welcome.sfl}")
        if answer.welcome.sfl != __version__:
            text = f"this is {__version__}: better have the same release on every process"
            self._say(NOT_CHECKED, "version", text)
        if answer.place:
            self._say(NOT_CHECKED, "place", f"{answer.place}, at the moment")
        return answer

    def _check_run(self, process: ClientProcess, welcome: Welcome) -> None:
        """Check what the server's run needs on this machine."""
        run, split, data = welcome.run, None, None
        if (recipe := self._recipe(run, welcome.client)) is None:
            self._say(NOT_CHECKED, "data", "this machine cannot take part in the run")
        elif (data := self._try("data", lambda: self._load(process, welcome, recipe))) is None:
            self._say(NOT_CHECKED, "model", "it is built for the data")
        else:
            split = self._try("model", lambda: self._build(process, welcome, recipe, data))
        num_train = len(data.train) if data else 0
        self._try(
            "disk",
            lambda: self._try_disk(_folder(self._node, welcome), welcome, split, num_train),
        )
        if run.weights != SOCKET:
            self._try("weights", lambda: self._try_store(run))
        elif welcome.fed not in (HERE, APART):
            where = self._node.fed_server or welcome.fed
            self._say(NOT_CHECKED, "weights", f"the fed server at {where} is tried at the start")

    def _access(self) -> Access | None:
        try:
            dialler = self._stack.enter_context(self._transport.client(self._node, say))
            return Access.of(self._node, dialler)
        except SflError as error:
            self._say_error("tls", error)
            return None

    def _say_error(self, what: str, error: SflError) -> None:
        """Print a failed check: of the token, if the reason names it."""
        self._say(NOT_OK, "token" if "--token-file" in str(error) else what, reason_of(error))

    def _wanted_id(self, process: ClientProcess) -> int | None:
        tokens, told = process.access.tokens, self._node.client_id
        return tokens.only_client if told is None and tokens else told

    def _connect(self, process: ClientProcess) -> tuple[Channel, str]:
        node, access = self._node, process.access
        link = access.connect(node.server, node)
        link.peer_name = "server"
        return link, f"{node.server} answers{', under TLS' if link.certificate else ''}"

    def _authenticate(self, process: ClientProcess, link: Channel) -> tuple[bool, str]:
        wanted = self._wanted_id(process)
        process.access.authenticate(
            link, Peer(CLIENT, ANY_ID if wanted is None else wanted), SERVER
        )
        return True, "the server has the same"

    def _ask_about_report(self, process: ClientProcess, report: DataReport) -> str:
        """Return the server's answer to a report, over a new connection."""
        link, _ = self._connect(process)
        with link:
            if process.access.tokens:
                self._authenticate(process, link)
            ours = fingerprint(process.devices[0])
            talk = client_check(link, self._wanted_id(process), ours, report)
            return run_blocking(talk).problem

    def _recipe(self, run: RunConfig, client: int) -> Recipe | None:
        """Look up the names in the run's options."""
        try:
            return recipe_of(run, self._node, client)
        except ConfigError as error:
            self._say_error("model", error)
            return None

    def _load(
        self, process: ClientProcess, welcome: Welcome, recipe: Recipe
    ) -> tuple[ClientData, str]:
        run, client, node = welcome.run, welcome.client, self._node
        data, *_ = at_each_server(process.load(recipe, client, node, lambda line: None), recipe)
        counts = (
            f"{len(data.train)} train, {len(data.validation)} validation, {len(data.test)} test"
        )
        return data, f"{counts} samples of {run.dataset} for client_{client}"

    def _build(
        self, process: ClientProcess, welcome: Welcome, recipe: Recipe, data: ClientData
    ) -> tuple[SplitModel, str]:
        """Build the model, and ask the server whether it accepts the model and the data."""
        run = welcome.run
        split = SplitModel(recipe, data.input_shape, len(data.classes), client=welcome.client)
        report = report_of(data, split, shares_figures=self._node.share_figures)
        if has_client_state(recipe):
            own = own_state_rounds(_folder(self._node, welcome), run)
            report = dataclasses.replace(report, rounds=own)
        if problem := self._ask_about_report(process, report):
            raise RunError(f"the server would refuse: {problem}")
        return split, f"{recipe.title}; the server takes it, and the data"

    def _try_disk(
        self, folder: Path, welcome: Welcome, split: SplitModel | None, num_train: int
    ) -> tuple[bool, str]:
        """Check that the folder is writable and its disk has space for the run."""
        if folder.exists() and not welcome.resumed:
            raise RunError(f"{folder} exists: another client of this run wrote there")
        where, text = _writable(folder)
        if split is None:
            return True, f"{text}; how much the run takes is not known"
        recipe = split.recipe.changed(keep_tensors=self._node.keep_tensors)
        takes = check_disk(
            where, recipe, lambda recipe: disk_bytes(recipe, split, [num_train]), may_change=True
        )
        return True, f"{text}; {takes}"

    def _try_store(self, run: RunConfig) -> tuple[bool, str]:
        """Check that this client allows the store of weights, and that it can be used."""
        address = allowed_address(run.weights, self._node.allow_weights)
        patience = self._node.connect_timeout
        with tempfile.TemporaryDirectory() as scratch:
            place = StoreOptions(address, Path(scratch), patience, patience, say).open_place()
            assert place is not None
            place.check()
        return True, f"{place.title} can be used"


def _devices(node: ClientNode) -> tuple[Devices, str]:
    devices = devices_of(node)
    return devices, ", ".join(map(str, devices))


def _folder(node: ClientNode, welcome: Welcome) -> Path:
    return node.out_path / "client" / welcome.run.run / f"client_{welcome.client}"


def _writable(folder: Path) -> tuple[Path, str]:
    """Return the folder, or its nearest existing parent, after a test write.

    Raises:
        RunError: the folder is not writable.
    """
    where = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            file.write(b"x")
    except OSError as error:
        raise RunError(f"cannot write to {where}: {error.strerror}; see --out") from error
    return where, f"{where} can be written to"
