"""Options of one machine (server, client or simulation); they are never sent."""

import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from sfl.config import MOST, check_choices, option, require
from sfl.errors import ConfigError
from sfl.values import KeepTensors, LinkShape, parse_bytes

DEFAULT_PORT = 8765
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}|[0-9A-Fa-f:]{2,39}")  # a name or address
_MOST_SAMPLES = 2**31 - 1  # as in sfl.archive.records
# Options of a server's machine that a finished model has no use for.
_OF_TRAINING = (
    "resume", "role", "fed_server", "task_servers", "init", "track", "profile", "max_samples",
    "on_missing", "round_timeout", "min_clients", "at_once", "weights_timeout", "on_end",
)  # fmt: skip
# Options that a hop or a task's server has no use for; it goes on by itself with the run that the
# main server has.
_OF_MAIN = (
    "resume", "serve", "fed_server", "track", "max_samples", "on_missing", "round_timeout",
    "min_clients", "at_once", "weights_timeout", "task_servers",
)  # fmt: skip
MOST_HOPS = 8
TASK_NAME = r"[a-z][a-z0-9_]{0,31}"  # in names of files, too
_ROLES = re.compile(rf"all|main|fed|hop:[1-{MOST_HOPS}]|task:{TASK_NAME}")


@dataclass(frozen=True)
class NodeConfig:
    """Options of every machine."""

    table: ClassVar[str] = "server"  # of a TOML configuration file, beside [run]

    device: str = option(
        "auto", "cpu, cuda, cuda:N, or auto: cuda if there is one; of a server with a copy of its"
        " model for each client, and of several clients in one process, also a list, as"
        " cuda:0,cuda:1, over which these are spread",
    )  # fmt: skip
    threads: int = option(1, "threads that torch computes with; part of what makes a run exact")
    data_dir: str = option("", "folder of the data sets; else $SFL_DATA_DIR, else ./data")
    cache_dir: str = option(
        "", "folder for decoded data sets; else $SFL_CACHE_DIR, else ~/.cache/sfl"
    )
    out: str = option("shared_files", "folder that runs are written into")
    allow_import: str = option(
        "", "comma-separated package.module:function that another machine may name as model or data"
    )
    profile: bool = option(
        False, "write where the time of each round's steps goes: profile.csv in the run's folder"
    )
    weights_timeout: float = option(
        600.0, "seconds to wait for a weight store that does not answer, before the run ends"
    )

    def check(self) -> None:
        """Raise ``ConfigError`` for a value out of range."""
        require(self.threads >= 1, "threads", self.threads, "at least 1")
        _check_timeout("weights_timeout", self.weights_timeout)
        self.check_device()
        check_choices(self)

    def check_device(self) -> None:
        """Raise ``ConfigError`` if the device is none."""
        if not re.fullmatch(r"auto|cuda|cpu(,cpu)*|cuda:\d+(,cuda:\d+)*", self.device, re.ASCII):
            raise ConfigError(
                f"--device {self.device!r}: give auto, cpu, cuda or cuda:N, or a list of one kind,"
                " as cuda:0,cuda:1"
            )

    @property
    def devices(self) -> list[str]:
        """The names of the devices to compute on; a server's models are dealt to them in turn."""
        return self.device.split(",")

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir or os.environ.get("SFL_DATA_DIR", "") or "data").expanduser()

    @property
    def cache_path(self) -> Path:
        chosen = self.cache_dir or os.environ.get("SFL_CACHE_DIR", "")
        try:
            return Path(chosen or "~/.cache/sfl").expanduser()
        except RuntimeError:  # the user has no home folder, as in some containers
            return Path(tempfile.gettempdir()) / "sfl-cache"

    @property
    def out_path(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def allowed_imports(self) -> frozenset[str]:
        return frozenset(name.strip() for name in self.allow_import.split(",") if name.strip())


@dataclass(frozen=True)
class PeerNode(NodeConfig):
    """Options of a machine that communicates with others."""

    peer_timeout: float = option(
        60.0, "seconds without any message from a peer until it counts as lost"
    )
    token_file: str = option(
        "", "file of the secret that server and clients share, or of one for each client; made by"
        " python -m sfl.auth new-token FILE",
    )  # fmt: skip
    seal_file: str = option(
        "", "with hops: file of a secret of clients and server that the hops do not have, so that"
        " not even a hop that lies reads what passes it; made like a token",
    )  # fmt: skip
    tls_cert: str = option(
        "", "certificate (PEM) of the server, or of a client whose server requires one"
    )
    tls_key: str = option("", "its private key (PEM)")
    tls_ca: str = option(
        "", "CA certificates (PEM) that the server's must be signed by; connections then use TLS"
    )

    memory_limit: str = option(
        "", "memory that other machines' requests may take here, as 500mb or 4gb: model, images and"
        " batches of a server's run, samples of a client; half of this machine's if not given",
    )  # fmt: skip
    link: str = option(
        "", "simulate a slower link for this machine's connections: 100mbit,50ms[,jitter=5ms]"
        "[,loss=0.001]; each direction by itself",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        _check_timeout("peer_timeout", self.peer_timeout)
        _ = self.link_shape
        if self.memory_limit:
            parse_bytes(self.memory_limit)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key: give both, or none")

    @property
    def link_shape(self) -> LinkShape:
        """The simulated link of this machine's connections.

        Raises:
            ConfigError: ``link`` is malformed.
        """
        return LinkShape.parse(self.link)


@dataclass(frozen=True)
class TrackingNode(NodeConfig):
    """Options of a machine that starts a run and has its figures."""

    init: str = option(
        "", "weights that the run starts from, in place of the seed's: a run's folder, a file of"
        " sfl-export --to torch, or pretrained for torchvision's", form="RUN|FILE|pretrained",
    )  # fmt: skip

    track: str = option(
        "", "also show the run's figures with one or more of {names}, separated by commas (see"
        " docs/metrics.md)",
    )  # fmt: skip


@dataclass(frozen=True)
class ServerNode(PeerNode, TrackingNode):
    """Options of a server's machine."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 or :: for other machines")
    port: int = option(DEFAULT_PORT, "port to listen on; 0 takes a free one and prints it")
    advertise: str = option(
        "", "host at which clients reach this machine, if torchrun starts the server; else, from"
        " another machine, its name",
    )  # fmt: skip
    transport: str = option(
        "tcp", "how clients reach the server: {names} (see docs/transports.md); with ws over TCP as"
        " well as over WebSocket",
    )  # fmt: skip
    insecure: bool = option(
        False, "let anyone who reaches the port take part without a token, also from other machines"
    )
    tls_client_ca: str = option(
        "", "CA certificates (PEM) that a client's must be signed by; others cannot connect"
    )
    max_samples: int = option(
        10_000_000, "most samples that a client may report, if the server does not know the size of"
        " the data set",
    )  # fmt: skip
    max_pending: int = option(
        0, "most connections at once that are not yet authenticated or registered; 0: 64, and two"
        " for each client",
    )  # fmt: skip
    on_missing: str = option(
        "wait", "lost clients: wait for them, or skip them until they come back",
        ("wait", "skip"),
    )  # fmt: skip
    round_timeout: float = option(
        600.0, "with --on-missing skip, seconds that a round waits for a lost or silent client"
        " before it closes without it",
    )  # fmt: skip
    min_clients: int = option(
        1, "fewest clients of a round; with fewer, or fewer than --aggregation needs, it waits for"
        " others to come back",
    )  # fmt: skip
    at_once: int = option(
        0, "most clients that train at the same time if each has a copy of the server's model:"
        " the copies of those that wait take less memory; 0: all",
    )  # fmt: skip
    role: str = option(
        "all", "main (server), fed (server), all: both in one process; or hop:1, hop:2 ... between"
        " the clients and the server; or task:NAME, the server of a further task (see"
        " docs/topologies.md)",
    )  # fmt: skip
    next: str = option(
        "", "HOST:PORT of the next hop towards the server, or of the server, for --role hop:N and"
        " task:NAME",
    )  # fmt: skip
    next_token_file: str = option(
        "", "file of the token that a hop or a task's server shows there; else its --token-file"
    )
    task_servers: str = option(
        "", "where clients reach the servers of further tasks, as parity=HOST:PORT",
        form="NAME=HOST:PORT[,...]",
    )  # fmt: skip
    fed_server: str = option(
        "", "HOST:PORT of the fed server, for --role main; clients connect to it as well"
    )
    on_end: str = option(
        "", "command that a shell runs here when the run is done, has failed or was interrupted,"
        " with SFL_OUTCOME and SFL_RUN_DIR in its environment",
    )  # fmt: skip
    resume: str = option(
        "", "folder of a run to resume with its own options; --rounds may be larger"
    )
    serve: str = option(
        "", "instead of training: folder of a run whose server's part of the model is held for"
        " those who send activations to it (sfl-predict), until interrupted",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        require(0 <= self.port < 65536, "port", self.port, "in [0, 65535]")
        _check_timeout("round_timeout", self.round_timeout)
        is_host = not self.advertise or bool(HOST.fullmatch(self.advertise))
        require(is_host, "advertise", self.advertise, "a host's name or address, without a port")
        require(self.max_pending >= 0, "max_pending", self.max_pending, "0 or more")
        valid = 1 <= self.max_samples <= _MOST_SAMPLES
        require(valid, "max_samples", self.max_samples, f"at least 1 and at most {_MOST_SAMPLES}")
        if self.serve and (given := self.given(_OF_TRAINING)):
            raise ConfigError(f"--serve: leave out {', '.join(given)}: nothing is trained")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("--tls-client-ca: is for a server with --tls-cert and --tls-key")
        wanted = f"all, main, fed, hop:1 to hop:{MOST_HOPS}, or task:NAME"
        require(bool(_ROLES.fullmatch(self.role)), "role", self.role, wanted)
        if self.tls_ca and not (self.role == "main" or self.follows):
            raise ConfigError("--tls-ca: is for clients, and for --role main, hop:N and task:NAME")
        if bool(self.next) != self.follows:
            raise ConfigError("--next: is for --role hop:N and task:NAME, which want it")
        if self.follows and (given := self.given(_OF_MAIN)):
            raise ConfigError(f"--role {self.role}: leave out {', '.join(given)}")
        require(self.min_clients >= 1, "min_clients", self.min_clients, "at least 1")
        require(self.at_once >= 0, "at_once", self.at_once, "0 or more")
        if self.at_once and self.role == "fed":
            raise ConfigError("--at-once: is for the main server")
        if self.on_missing == "skip" and self.role != "all":
            raise ConfigError("--on-missing skip: is for --role all")
        if self.fed_server and self.role != "main":
            raise ConfigError(f"--fed-server {self.fed_server}: is for --role main")

    @property
    def follows(self) -> bool:
        """Whether this is a hop or the server of a further task, which the main server leads."""
        return self.role.startswith(("hop:", "task:"))

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of these options that are not at their defaults, as they are typed."""
        defaults = {spec.name: spec.default for spec in fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        return ["--" + name.replace("_", "-") for name in given]

    @property
    def skip_after_s(self) -> float | None:
        """Seconds after which a round closes without an absent client; None: it waits."""
        return self.round_timeout if self.on_missing == "skip" else None

    @property
    def silence_s(self) -> float:
        """Seconds of silence after which a peer counts as lost or missing."""
        return min(self.peer_timeout, self.skip_after_s or math.inf)


@dataclass(frozen=True)
class ClientNode(PeerNode):
    """Options of a client's machine."""

    table: ClassVar[str] = "client"

    server: str = option(
        f"127.0.0.1:{DEFAULT_PORT}",
        f"HOST:PORT of the server; without a port, {DEFAULT_PORT};"
        " ws://HOST:PORT/ and others: see docs/transports.md",
    )
    client_id: int | None = option(None, "0 to clients-1; the lowest free one if not given")
    client_ids: str = option(
        "", "host many clients in this process, one connection each: 0-99, or 0-9,20-29"
    )
    check_: bool = option(
        False, "try address, token, data, model and disk without taking part, and print the results"
    )
    connect_timeout: float = option(60.0, "seconds to wait for a server that is not up yet")
    reconnect_timeout: float = option(
        600.0, "seconds to try to reach a lost server again; 0: end at once"
    )
    keep_tensors: str = option("none", "as the server's option; the server keeps the same files")
    keep_labels: bool = option(
        False, "refuse a run in which labels or counts of them would be sent, before anything is"
        " sent about this client's",
    )  # fmt: skip
    share_figures: bool = option(
        False, "where labels stay at the clients: tell the server the figures of each class as well"
    )
    allow_weights: str = option(
        "", "gs://BUCKET/PREFIX that the server may name for weights, or this machine's dir:PATH;"
        " if given, any other place is refused",
    )  # fmt: skip
    fed_server: str = option(
        "", "HOST:PORT at which this machine reaches the fed server; else as the server says"
    )

    def check(self) -> None:
        super().check()
        require((self.client_id or 0) >= 0, "client_id", self.client_id, "0 or more")
        _check_timeout("connect_timeout", self.connect_timeout)
        patience = self.reconnect_timeout
        valid = math.isfinite(patience) and patience >= 0
        require(valid, "reconnect_timeout", patience, "0 or more")
        if self.client_ids and self.client_id is not None:
            raise ConfigError("--client-id and --client-ids: give one of them")
        _ = self.hosted
        if self.tls_cert and not self.tls_ca:
            raise ConfigError("--tls-cert: without --tls-ca there is no TLS to show it in")
        _ = self.kept_tensors

    @property
    def kept_tensors(self) -> KeepTensors:
        """Which rounds' tensors stay on this machine.

        Raises:
            ConfigError: ``keep_tensors`` is malformed.
        """
        return KeepTensors.parse(self.keep_tensors)

    @property
    def hosted(self) -> list[int]:
        """The ids of the clients that this process hosts; empty for a single client.

        Raises:
            ConfigError: ``client_ids`` is malformed or repeats an id.
        """
        ids: list[int] = []
        for part in self.client_ids.split(",") if self.client_ids else ():
            found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
            first, last = (int(n) for n in found.groups(found[1])) if found else (1, 0)
            ids += range(first, min(last, MOST["clients"]) + 1)
            if last < first or len(set(ids)) != len(ids):
                raise ConfigError(f"--client-ids {self.client_ids}: give 0-99, or 0-9,20-29")
        return ids


@dataclass(frozen=True)
class SimulationNode(TrackingNode):
    """Options of a simulation's machine."""

    table: ClassVar[str] = "simulation"

    away: str = option(
        "", "comma-separated CLIENT:ROUND[.STEP][-BACK], counted from 0: the client is lost in this"
        " round, before this step, and takes part again from round BACK on",
    )  # fmt: skip
    client_device: str = option(
        "", "device that the clients compute on, as --device; --device if not given"
    )

    def check(self) -> None:
        super().check()
        self.of_clients.check_device()

    @property
    def of_clients(self) -> NodeConfig:
        """The same machine, as the clients of the simulation use it."""
        return replace(self, device=self.client_device or self.device)


def _check_timeout(name: str, value: float) -> None:
    require(math.isfinite(value) and value > 0, name, value, "a number above 0")
