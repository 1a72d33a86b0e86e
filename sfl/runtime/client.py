"""Run a client: connect, register, load the data, take part in the rounds."""

import contextlib
import dataclasses
import functools
import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sfl import __version__
from sfl.archive.profile import Profile
from sfl.archive.round_log import ClientLog
from sfl.archive.run_folder import (
    CLIENT_LOG,
    RunFolder,
    has_no_steps,
    make_folder,
    open_folder,
    options_record,
    reporting_failure,
    say,
    to_json,
)
from sfl.conversation.alignment import client_align, client_send_ids
from sfl.conversation.join import HERE, Welcome, client_join
from sfl.conversation.limits import client_limits
from sfl.conversation.party import ClientParty
from sfl.conversation.report import DataReport, send_report
from sfl.conversation.round import client_run
from sfl.crash import crash_point
from sfl.environment import command_line, describe, fingerprint
from sfl.errors import PASSING, ConfigError, LetGo, PeerStopped, RunError, SflError
from sfl.files.torch_file import max_state_bytes
from sfl.model.topology import Holder, Segments, passing_links
from sfl.nodes import ClientNode
from sfl.options import check_goes_on
from sfl.runtime.access import Access, Registered, StoreAccess, closing_with_reason
from sfl.runtime.attempts import Attempts
from sfl.runtime.client_process import ClientProcess, devices_of, recipe_of
from sfl.runtime.resume import check_same_run, load_own_state, own_state_rounds
from sfl.runtime.same_model import report_of
from sfl.runtime.task_servers import (
    add_sides,
    at_each_server,
    closed_together,
    common_rounds,
    join_task_servers,
)
from sfl.strategy.merge import has_client_state
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import unordered
from sfl.transport.heartbeat import interval_s
from sfl.transport.tokens import SERVER, seal_secret
from sfl.transport.transports import transport_to
from sfl.weights.exchange import WeightStore
from sfl.wire.driver import Conversation, run_blocking
from sfl.wire.link import ANY_ID, CLIENT, Peer
from sfl.wire.members import Channel
from sfl.wire.messages import MessageType
from sfl.wire.payload import payload_store_in
from sfl.wire.seal import About, SealKey


def take_part(node: ClientNode) -> None:
    """Take part in one run as a client; reconnect to a lost server until the node's timeout.

    Raises:
        ConfigError, DataError: this machine cannot use the run's configuration or data.
        RunError: the server cannot be reached, or the folder cannot be written.
        PeerFailed: the server refused this client or ended the run, and gave a reason.
        ProtocolError, IntegrityError, ConnectionLost: from the server.
    """
    transport = transport_to(node.server)  # a bad address fails before torch starts
    with transport.client(node, say) as dialler:
        process = ClientProcess(Access.of(node, dialler), devices_of(node))
        run_blocking(take_part_in(process, node))


def take_part_in(process: ClientProcess, node: ClientNode) -> Conversation[None]:
    """Take part as one of the process's clients, see ``take_part``."""
    with contextlib.ExitStack() as stack:
        client, attempts, calls = _Client(node, process, stack), Attempts(), process.access.calls
        yield from client.take_part()
        while client.lost is not None:
            pause_s = attempts.pause_s(client.lost, client)
            yield from calls.run(functools.partial(time.sleep, pause_s))
            yield from client.take_part(client.patience_s)


class _Client:
    """One client, over all its connections."""

    def __init__(
        self,
        node: ClientNode,
        process: ClientProcess,
        stack: contextlib.ExitStack,
    ) -> None:
        self._node, self._process, self._access = node, process, process.access
        self._stack = stack
        self._instance = secrets.token_hex(16)
        self._welcome: Welcome | None = None  # of the first connection
        self._folder: RunFolder | None = None
        self._loaded: _Loaded | None = None
        self.lost: SflError | None = None  # why the last connection ended, if we may reconnect
        self._registered_at = math.inf  # when the last connection was registered

    @property
    def progress(self) -> tuple[int, int]:
        """How often the server has started this client, and how many steps it has done."""
        loaded = self._loaded
        return (loaded.num_starts, loaded.log.num_steps) if loaded else (0, 0)

    @property
    def patience_s(self) -> float:
        """How long to try to reach the server, in seconds."""
        node = self._node
        return node.reconnect_timeout if self._welcome else node.connect_timeout

    @property
    def registered_s(self) -> float:
        """Seconds since the last connection was registered; 0 if it never was."""
        return max(time.monotonic() - self._registered_at, 0.0)

    def take_part(self, reconnect_s: float | None = None) -> Conversation[None]:
        """Take part over one connection; afterwards ``lost`` is set if a reconnect may help.

        ``reconnect_s``: the timeout to connect again; None on the first connection.
        """
        self.lost, self._registered_at = None, math.inf
        calls = self._access.calls
        try:
            attempt = functools.partial(self._connect, reconnect_s)
            registered = yield from calls.run(
                lambda: self._access.follow(self._node.server, attempt)
            )
            self._registered_at = time.monotonic()
            with registered.link as link, closing_with_reason(link):
                yield from self._join(registered)
                yield from calls.run(link.close_gracefully)
        except BaseException as error:
            if isinstance(error, PASSING) and self._may_reconnect(error):
                self.lost = error
            elif self._folder:
                with reporting_failure(self._folder):
                    raise
            else:
                raise

    def _may_reconnect(self, error: SflError) -> bool:
        """Return whether a new connection may help.

        Not with a separate fed server, nor if the server said that it ends before the run began.
        """
        if self._welcome is None:  # the connection was lost before the server's answer
            return True
        if self._welcome.fed != HERE:
            return False
        return (
            self.progress[0] > 0 or isinstance(error, LetGo) or not isinstance(error, PeerStopped)
        )

    @property
    def _wanted_id(self) -> int | None:
        """The wanted client id: the option's, or that of the token file's only token."""
        tokens = self._access.tokens
        told = self._node.client_id
        return tokens.only_client if told is None and tokens else told

    def _connect(self, reconnect_s: float | None, address: str) -> Registered:
        """Connect and register in one call: servers drop connections that register late."""
        link = self._access.connect(address, self._node, reconnect_s)
        link.peer_name = "server"
        with closing_with_reason(link):
            return self._register(link, reconnect_s)

    def _register(self, link: Channel, reconnect_s: float | None) -> Registered:
        known = self._welcome
        wanted = known.client if known else self._wanted_id
        peer = Peer(CLIENT, ANY_ID if wanted is None else wanted)
        self._access.authenticate(link, peer, SERVER, known.run.run if known else "")
        ours = fingerprint(self._process.devices[0])
        joining = client_join(
            link, wanted, ours, instance=self._instance,
            heartbeat_s=interval_s(self._node.peer_timeout),
        )  # fmt: skip
        welcome = run_blocking(joining)
        crash_point("start.registered")
        if known:
            _check_run_unchanged(welcome, known)
        return Registered(link, welcome, self._instance, ours, reconnect_s)

    def _join(self, registered: Registered) -> Conversation[None]:
        welcome, registered.link.name = registered.welcome, f"client_{registered.welcome.client}"
        recipe = recipe_of(welcome.run, self._node, welcome.client)
        if self._folder is None:
            self._folder, self._welcome = self._open(welcome, recipe), welcome
        if self._loaded is None:
            self._loaded = _Loaded(welcome, recipe, self._node, self._process, self._folder)
        yield from self._loaded.run_on(registered, recipe)

    def _open(self, welcome: Welcome, recipe: Recipe) -> RunFolder:
        """Open this client's folder of the run, new or existing, and record its options."""
        node, name = self._node, f"client_{welcome.client}"
        path = node.out_path / "client" / welcome.run.run / name
        _check_folder(path, welcome)
        keep = dataclasses.replace(recipe.keep, tensors=node.kept_tensors)
        folder = self._stack.enter_context(open_folder(path, CLIENT_LOG, keep))
        folder.events.is_quiet = self._process.hosts_many
        folder.events.say(f"{name} of run {welcome.run.run} at {node.server}")
        if welcome.sfl != __version__:
            folder.events.say(
                f"warning: the server runs SFL {welcome.sfl}, this is {__version__}: better have"
                " the same release on every machine"
            )
        record = options_record(welcome.run, node)
        folder.archive.write("config", "config.json", to_json(record))
        environment = describe(self._process.devices[0], command_line())
        folder.archive.write("environment", "environment.json", to_json(environment))
        return folder


def _check_run_unchanged(welcome: Welcome, known: Welcome) -> None:
    """Check that the server still has the same run after a reconnect.

    Raises:
        RunError: it has another run.
    """
    try:
        check_goes_on(dataclasses.asdict(known.run), dataclasses.asdict(welcome.run))
    except ConfigError as error:
        raise RunError(f"the server has another run now: {error}") from error


def _check_folder(path: Path, welcome: Welcome) -> None:
    """Create a client's folder of a run, or check the existing one of a resumed run.

    Raises:
        RunError: it belongs to another run or client, or cannot be written.
    """
    if welcome.resumed and path.is_dir() and not path.is_symlink():
        try:
            check_same_run(path, welcome.run)
            return
        except RunError:
            if not has_no_steps(path):
                raise
    if not make_folder(path, CLIENT_LOG):
        raise RunError(
            f"{path} exists: another client of a run of this name wrote there, or this one did,"
            " before the server began anew; give another --out, or let the server --resume"
        )


class _Loaded:
    """A client's data and model, once loaded."""

    def __init__(
        self,
        welcome: Welcome,
        recipe: Recipe,
        node: ClientNode,
        process: ClientProcess,
        folder: RunFolder,
    ) -> None:
        self._client, self._recipe = welcome.client, recipe
        self._node, self._access = node, process.access
        self._folder, self._device = folder, process.device_of(self._client)
        run, events = recipe.run, folder.events
        loaded = process.load(recipe, self._client, node, events.say)
        self._at_servers = at_each_server(loaded, recipe)
        self._data, *further = self._at_servers
        shape, num_classes = self._data.input_shape, len(self._data.classes)
        self._split = SplitModel(recipe, shape, num_classes, client=self._client)
        self._report = report_of(self._data, self._split, shares_figures=self._node.share_figures)
        self._further = [report_of(d, self._split, shares_figures=False) for d in further]
        counts = ", ".join(f"{count} {part}" for part, count in self._report.num_samples.items())
        events.say(f"{counts} samples; {recipe.title}, on {self._device}")
        if found := unordered(self._split, {Holder.CLIENT: self._device}):
            events.say(f"warning: {found}")
        self.log = ClientLog(recipe.task, run, folder, shows_bar=not process.hosts_many)
        self.num_starts = 0  # how often the server has started this client

    def run_on(self, registered: Registered, recipe: Recipe) -> Conversation[None]:
        """Take part in the run over a connection, from the round that the server names."""
        self._recipe, self.log.run = recipe, recipe.run  # a resumed run may have more rounds
        folder, split, link = self._folder, self._split, registered.link
        link.limits = client_limits(split, payload_store_in(folder.path))
        report = self._report
        if has_client_state(recipe):
            own = own_state_rounds(folder.path, recipe.run)
            report = dataclasses.replace(report, rounds=own)
        weights = StoreAccess(self._node, self._access, folder, registered, report)
        with contextlib.ExitStack() as stack:
            store, fed = yield from weights.open(stack, max_state_bytes(split.front_spec))
            if fed is not None:
                fed.limits = link.limits
            others = yield from join_task_servers(stack, self._access, self._node, registered)
            report = dataclasses.replace(report, rounds=common_rounds(report.rounds, others))
            self._send_report(registered, recipe, report)
            if identified := self._data.identified:
                yield from client_send_ids(link, identified.ids)
            party = self._party(registered.link, store, functools.partial(self._start, fed, report))
            self.log.start_over()
            with (
                closed_together([link, *(other.link for other in others)]),
                contextlib.closing(self.log.progress),
            ):
                leader = recipe.leader(self._client)
                party.data, *further = yield from client_align(link, self._at_servers, leader)
                add_sides(party, others, further, self._further)
                yield from client_run(party)
            folder.archive.flush()
            if fed is not None:
                fed.send_message_as_json(MessageType.UNREGISTER)
                yield from self._access.calls.run(fed.close_gracefully)
            for other in others:
                yield from self._access.calls.run(other.link.close_gracefully)
        folder.events.say(f"the run is over; this client's log lies in {folder.path}")

    def _send_report(self, registered: Registered, recipe: Recipe, report: DataReport) -> None:
        """Report the data; agree with the server on a seal, if hops stand in between."""
        passing, link = passing_links(recipe.segments), registered.link
        if passing is None:
            send_report(link, report)
            return
        key = SealKey()
        about = About(
            recipe.run.run, self._client, is_client=True, passing=passing,
            has_figures=recipe.is_told_figures(self._client),
        )  # fmt: skip
        send_report(link, report, key.public)
        link.seal = key.agree(registered.welcome.seal, about, seal_secret(self._node))

    def _party(
        self, link: Channel, store: WeightStore, begin: Callable[[Segments, int, int], None]
    ) -> ClientParty:
        """Return this client's side of a run; ``begin`` is called at each start."""
        segments, folder = self._split.segments(Holder.CLIENT, self._device), self._folder
        return ClientParty(
            client=self._client,
            recipe=self._recipe,
            link=link,
            weights=store,
            split=self._split,
            archive=folder.archive,
            watcher=self.log,
            profile=Profile(folder.path, wanted=self._node.profile),
            segments=segments,
            data=self._data,
            shares_figures=self._node.share_figures,
            on_round=self._end_round,
            on_start=functools.partial(begin, segments),
        )

    def _end_round(self, round_index: int, figures: Mapping[str, float]) -> None:
        self.log.end_round(round_index, figures)
        self._folder.check_exists()

    def _start(
        self,
        fed: Channel | None,
        report: DataReport,
        segments: Segments,
        round_index: int,
        own_round: int,
    ) -> None:
        """Load the client's own state at a round's start; send a fed server the report."""
        if fed is not None:
            send_report(fed, report)
        self.num_starts += 1
        self._folder.archive.discard_from(round_index)
        load_own_state(self._folder.path, segments, self._recipe, self._client, own_round)
        if 0 < round_index < (rounds := self._recipe.run.rounds):
            self._folder.events.say(f"going on with round {round_index + 1}/{rounds}")
