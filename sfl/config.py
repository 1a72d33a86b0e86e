"""The options: ``RunConfig`` (the same on every machine) and one ``...Node`` for each program.

The dataclasses are the command line (``sfl.options`` derives it), the record and the documentation.
``RunConfig`` travels from the server to each client in ``REGISTERED``; a node's options never do.
"""

import dataclasses
import difflib
import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sfl.errors import ConfigError, quoted
from sfl.shaping import LinkShape

DEFAULT_PORT = 8765
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# More than anybody runs; a configuration may come from somebody who means harm.
_MOST = {"clients": 100_000, "rounds": 2**31 - 1, "local_epochs": 10_000, "batch_size": 2**20}


_MOST_SAMPLES = 2**31 - 1  # as sfl.described
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str) -> int:
    """Return how many bytes ``500mb`` or ``1.5gb`` are.

    Raises:
        ConfigError: the text is no such size.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kmgt]b)", text.strip().lower(), re.ASCII)
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not count:
        raise ConfigError(f"--memory-limit {text!r:.40}: give a size as 500mb or 4gb")
    return count


def counted(number: int, noun: str) -> str:
    """Return ``1 client``, ``3 clients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that no registry has, with the names near it, or all."""
    known = sorted(known)
    if near := near_names(name, known):
        return ConfigError(f"unknown {kind} {quoted(name)}; did you mean {' or '.join(near)}?")
    return ConfigError(f"unknown {kind} {quoted(name)}; there are {', '.join(known)}")


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the names that somebody may have meant, the nearest first."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return [by_lower[one] for one in near]


def _option(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """What a run computes. The server's; every client receives it when it registers."""

    table: ClassVar[str] = "run"

    scheme: str = _option(
        "sflv1",
        "who shares what: sl, sflv1, sflv2, sflv3, fl, sync-sgd; in simulation also central",
    )
    model: str = _option(
        "lenet5",
        "mlp, lenet5, cnn-mnist, cnn-cifar10, cnn-femnist, alexnet, vgg16, resnet18, resnet50,"
        " or your own package.module:function",
    )
    cut: int | None = _option(
        None, "number of top-level blocks on the client; the model's own if not given"
    )
    dataset: str = _option(
        "mnist-5k",
        "mnist-5k, mnist, fashion-mnist, emnist, emnist-byclass, emnist-letters, emnist-digits,"
        " femnist, cifar10, cifar100, ham10000, or your own package.module:function",
    )
    image_size: int = _option(0, "side of the images in pixels; 0: the data set's own")
    augment: str = _option(
        "", "random changes to training images: none, or hflip, vflip, crop:padding=4 and"
        " rotate:degrees=10 joined by +; the data set's own if not given",
    )  # fmt: skip
    normalize: str = _option(
        "", "mean=M,std=S that samples are normalised by, bytes divided by 255 before: one number"
        " for all channels, or one for each as 0.5/0.4/0.3; the data set's own if not given",
    )  # fmt: skip
    partition: str = _option(
        "iid",
        "who has which training samples: own, iid, sizes:0.2,0.2,0.6, dirichlet:0.5,"
        " dirichlet-size:0.5, shards:2, writer (see the README)",
    )
    clients: int = _option(3, "number of clients; the run starts when all are there")
    max_clients: int = _option(
        0,
        "more clients that may join before the start, with --partition own; 0: none, as --clients",
    )
    participation: float = _option(1.0, "share of the clients that is drawn for each round")
    rounds: int = _option(10, "number of global rounds, each ending in one averaging")
    local_epochs: int = _option(1, "passes over a client's data in a round")
    batch_size: int = _option(32, "samples in a step")
    optimizer: str = _option("adam", "adam or sgd, on both halves")
    lr: float = _option(0.001, "learning rate")
    lr_schedule: str = _option(
        "constant", "constant, cosine[:floor=0], or step[:every=10,factor=0.1], by rounds"
    )
    momentum: float = _option(0.0, "momentum of sgd")
    weight_decay: float = _option(0.0, "L2 penalty added to the gradients")
    optimizer_state: str = _option(
        "reset", "optimisers begin each round fresh, or keep their state", ("reset", "keep")
    )
    lr_rounds: int = _option(
        0, "rounds over which the schedule runs, kept when a run goes on; 0: as --rounds"
    )
    clip_norm: float = _option(0.0, "clip each half's gradient to this norm; 0: do not")
    class_weights: str = _option(
        "none", "weights of the classes in the training loss: none, balanced (clients then tell"
        " the server how many samples they have of each), or 1,2.5,... for each class",
    )  # fmt: skip
    fedprox_mu: float = _option(0.0, "FedProx: pull of a client's weights to the round's start")
    server_order: str = _option(
        "fixed", "clients that share a back: in drawn order, or as they come", ("fixed", "arrival")
    )
    aggregation: str = _option(
        "fedavg", "fedavg, fedavgm, fedadagrad, fedadam, fedyogi, median, trimmed-mean or krum;"
        " options behind a colon: fedadam:lr=0.03",
    )  # fmt: skip
    aggregation_weights: str = _option(
        "samples", "clients weigh by their training samples, or equally", ("samples", "equal")
    )
    weights: str = _option(
        "socket", "how client-side weights travel: socket, dir:PATH or gs://BUCKET/PREFIX"
    )
    on_nonfinite: str = _option(
        "reject", "NaN or infinity in what a peer sends: refuse it, or warn once a round",
        ("reject", "log"),
    )  # fmt: skip
    keep_tensors: str = _option(
        "all", "rounds whose tensors stay on disk: all, last, every:N or none"
    )
    keep_models: str = _option(
        "all", "rounds whose models stay on disk, beside what the run goes on from and what kept"
        " tensors are replayed with: all, last or every:N",
    )  # fmt: skip
    seed: int = _option(0, "every random draw derives from it")
    run: str = _option("", "name of the run and its folder; the start time if not given")

    def check(self) -> None:
        """Raise ``ConfigError`` for a value out of range; names are checked by their registries."""
        for name, most in _MOST.items():
            value = getattr(self, name)
            _require(1 <= value <= most, name, value, f"at least 1 and at most {most}")
        _require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a number above 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(0 < self.participation <= 1, "participation", self.participation, "in (0, 1]")
        for name in ("weight_decay", "clip_norm", "fedprox_mu"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "0 or more")
        _require(0 <= self.image_size <= 4096, "image_size", self.image_size, "0 to 4096")
        _require(self.lr_rounds >= 0, "lr_rounds", self.lr_rounds, "0 or more")
        most = self.max_clients
        fine = most == 0 or self.clients <= most <= _MOST["clients"]
        _require(fine, "max_clients", most, "at least --clients")
        if most > self.clients and self.partition != "own":
            raise ConfigError(
                f"--max-clients {most}: --partition {self.partition} deals the data out to"
                f" {counted(self.clients, 'client')}; more can join with --partition own alone"
            )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        _check_choices(self)
        if self.run:
            wanted = "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
            _require(bool(RUN_NAME.fullmatch(self.run)), "run", self.run, wanted)
        KeepTensors.parse(self.keep_tensors)
        KeepModels.parse(self.keep_models)

    @property
    def most_clients(self) -> int:
        """How many clients may register."""
        return max(self.clients, self.max_clients)


@dataclass(frozen=True)
class KeepTensors:
    """Which rounds' tensors stay on disk: every ``period``-th from round 0, or the last."""

    period: int  # 0: none of its own account
    last: bool

    @classmethod
    def parse(cls, text: str) -> "KeepTensors":
        """Return the policy that ``all``, ``last``, ``every:N`` or ``none`` names.

        Raises:
            ConfigError: the text is none of them.
        """
        fixed = {"all": cls(1, False), "last": cls(0, True), "none": cls(0, False)}
        if text in fixed:
            return fixed[text]
        every, _, number = text.partition(":")
        if every == "every" and number.isascii() and number.isdigit() and int(number) > 0:
            return cls(int(number), False)
        raise ConfigError(f"--keep-tensors {text!r}: give all, last, every:N or none")

    def stays(self, round_index: int) -> bool:
        """Say whether this round's files stay, whatever comes later."""
        return self.period > 0 and round_index % self.period == 0

    def records(self, round_index: int) -> bool:
        """Say whether this round's tensors are written at all."""
        return self.last or self.stays(round_index)

    @property
    def records_all(self) -> bool:
        """Whether every round's tensors are written."""
        return self.last or self.period == 1

    def num_kept(self, rounds: int) -> int:
        """Return of how many of ``rounds`` rounds the tensors lie on disk at the end."""
        return 1 if self.last else -(-rounds // self.period) if self.period else 0


@dataclass(frozen=True)
class KeepModels:
    """Which rounds' models stay on disk: those that were asked for, and those that are needed.

    The tensors of a round are replayed with the models that it started from, and compared with
    those that it gave.
    """

    models: KeepTensors
    tensors: KeepTensors
    behind: int = 0  # how many more rounds others may go back than this folder's checkpoints

    @classmethod
    def parse(cls, text: str, keep_tensors: str = "none", behind: int = 0) -> "KeepModels":
        """Return the policy that ``all``, ``last`` or ``every:N`` names.

        Raises:
            ConfigError: the text is none of them.
        """
        try:
            if text == "none":
                raise ConfigError("what a run goes on from stays")
            return cls(KeepTensors.parse(text), KeepTensors.parse(keep_tensors), behind)
        except ConfigError:
            raise ConfigError(f"--keep-models {text!r}: give all, last or every:N") from None

    def stays(self, round_index: int) -> bool:
        """Say whether the models after a round stay when nothing goes on from them any more."""
        starts, ends = self.tensors.stays(round_index + 1), self.tensors.stays(round_index)
        return self.models.stays(round_index) or starts or ends

    def num_kept(self, rounds: int) -> int:
        """Return about how many sets of models lie on disk, at most, in ``rounds`` rounds."""
        tensors = 0 if self.tensors.last else 2 * self.tensors.num_kept(rounds)
        return min(self.models.num_kept(rounds) + tensors + MODELS_IN_USE, rounds + 1)


MODELS_IN_USE = 3  # what two checkpoints start from, and what is being made


@dataclass(frozen=True)
class NodeConfig:
    """What concerns one machine alone."""

    table: ClassVar[str] = "server"  # of a configuration file, beside [run]

    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    threads: int = _option(1, "threads that torch computes with; part of what makes a run exact")
    data_dir: str = _option("", "folder of the data sets; else $SFL_DATA_DIR, else ./data")
    cache_dir: str = _option(
        "",
        "folder for what takes long to read; else $SFL_CACHE_DIR, else ~/.cache/sfl",
    )
    out: str = _option("shared_files", "folder that runs are written into")
    allow_import: str = _option(
        "", "comma-separated package.module:function that another machine may name as model or data"
    )
    profile: bool = _option(
        False, "write where the time of each round's steps goes: profile.csv in the run's folder"
    )
    weights_timeout: float = _option(
        600.0, "seconds that a store of weights may stay away before the run ends"
    )

    def check(self) -> None:
        """Raise ``ConfigError`` for a value out of range."""
        _require(self.threads >= 1, "threads", self.threads, "at least 1")
        _check_timeout("weights_timeout", self.weights_timeout)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"--device {self.device!r}: give auto, cpu, cuda or cuda:N")
        _check_choices(self)

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir or os.environ.get("SFL_DATA_DIR", "") or "data").expanduser()

    @property
    def cache_path(self) -> Path:
        chosen = self.cache_dir or os.environ.get("SFL_CACHE_DIR", "")
        try:
            return Path(chosen or "~/.cache/sfl").expanduser()
        except RuntimeError:  # a user without a home folder, as in some containers
            return Path(tempfile.gettempdir()) / "sfl-cache"

    @property
    def out_path(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def allowed_imports(self) -> frozenset[str]:
        return frozenset(name.strip() for name in self.allow_import.split(",") if name.strip())


@dataclass(frozen=True)
class PeerNode(NodeConfig):
    """A machine that others talk to."""

    peer_timeout: float = _option(
        60.0, "seconds without a sign of life from a peer until it is taken for lost"
    )
    token_file: str = _option(
        "", "file of the secret that server and clients share, or of one for each client; made by"
        " python -m sfl.auth new-token FILE",
    )  # fmt: skip
    tls_cert: str = _option(
        "", "certificate (PEM) by which the server, or a client whose server wants one, is known"
    )
    tls_key: str = _option("", "its private key (PEM)")
    tls_ca: str = _option(
        "", "certificates (PEM) of whom to trust with the server's: the connection is under TLS"
    )

    memory_limit: str = _option(
        "", "memory that what other machines name may take here, as 500mb or 4gb: model, images and"
        " batches of a server's run, samples of a client; half of this machine's if not given",
    )  # fmt: skip
    link: str = _option(
        "", "play a slower link for this machine's connections: 100mbit,50ms[,jitter=5ms]"
        "[,loss=0.001]; each direction by itself",
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        _check_timeout("peer_timeout", self.peer_timeout)
        LinkShape.parse(self.link)
        if self.memory_limit:
            parse_bytes(self.memory_limit)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key: give both, or none")


@dataclass(frozen=True)
class ServerNode(PeerNode):
    """The server's machine."""

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 or :: for other machines")
    port: int = _option(DEFAULT_PORT, "port to listen on; 0 takes a free one and says which")
    insecure: bool = _option(
        False, "let whoever reaches the port take part, from other machines too, without a token"
    )
    tls_client_ca: str = _option(
        "", "certificates (PEM) of whom to trust with clients': only who has one may connect"
    )
    max_samples: int = _option(
        10_000_000, "most samples that a client may report, where the server does not know how many"
        " the data set has",
    )  # fmt: skip
    max_pending: int = _option(
        0, "connections that may wait at once until they have shown who they are; 0: 64, and two"
        " for each client",
    )  # fmt: skip
    on_missing: str = _option(
        "wait", "clients that are lost are waited for; or skipped, until they come back",
        ("wait", "skip"),
    )  # fmt: skip
    round_timeout: float = _option(
        600.0, "seconds that a round waits for a client that is lost or silent, with"
        " --on-missing skip; then it closes without it",
    )  # fmt: skip
    min_clients: int = _option(
        1, "fewest clients that must be there; with fewer, rounds wait for others to come back"
    )
    at_once: int = _option(
        0, "clients that train at the same time where each has a copy of the server's model"
        " (sflv1, sflv3); the others wait and their copies take less memory; 0: all",
    )  # fmt: skip
    role: str = _option(
        "all", "main server, fed server, or both in one process", ("all", "main", "fed")
    )
    fed_server: str = _option(
        "", "HOST:PORT of the fed server, for --role main; clients must reach it, too"
    )
    resume: str = _option(
        "", "folder of a run that goes on, with its options; --rounds may be more than it had"
    )

    def check(self) -> None:
        super().check()
        _require(0 <= self.port < 65536, "port", self.port, "in [0, 65535]")
        _check_timeout("round_timeout", self.round_timeout)
        _require(self.max_pending >= 0, "max_pending", self.max_pending, "0 or more")
        fine = 1 <= self.max_samples <= _MOST_SAMPLES
        _require(fine, "max_samples", self.max_samples, f"at least 1 and at most {_MOST_SAMPLES}")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("--tls-client-ca: is for a server with --tls-cert and --tls-key")
        if self.tls_ca and self.role != "main":
            raise ConfigError("--tls-ca: is for clients, and for --role main")
        _require(self.min_clients >= 1, "min_clients", self.min_clients, "at least 1")
        _require(self.at_once >= 0, "at_once", self.at_once, "0 or more")
        if self.at_once and self.role == "fed":
            raise ConfigError("--at-once: is for the main server")
        if self.on_missing == "skip" and self.role != "all":
            raise ConfigError("--on-missing skip: is for --role all")
        if self.fed_server and self.role != "main":
            raise ConfigError(f"--fed-server {self.fed_server}: is for --role main")

    @property
    def skip_after_s(self) -> float | None:
        """Seconds after which a round goes on without a client; None: it waits."""
        return self.round_timeout if self.on_missing == "skip" else None

    @property
    def silence_s(self) -> float:
        """Seconds of silence that have consequences."""
        return min(self.peer_timeout, self.skip_after_s or math.inf)


@dataclass(frozen=True)
class ClientNode(PeerNode):
    """A client's machine."""

    table: ClassVar[str] = "client"

    server: str = _option(
        f"127.0.0.1:{DEFAULT_PORT}", f"HOST:PORT of the server; without a port, {DEFAULT_PORT}"
    )
    client_id: int | None = _option(None, "0 to clients-1; the lowest free one if not given")
    client_ids: str = _option(
        "", "host many clients in this process, one connection each: 0-99, or 0-9,20-29"
    )
    check_: bool = _option(
        False, "try address, token, data, model and disk without taking part, and say what is well"
    )
    connect_timeout: float = _option(60.0, "seconds to wait for a server that is not up yet")
    reconnect_timeout: float = _option(
        600.0, "seconds to try to reach a server that was lost; 0: end at once"
    )
    keep_tensors: str = _option("none", "as the server's; the server has the same files")
    allow_weights: str = _option(
        "", "gs://BUCKET/PREFIX that the server may name for weights, or this machine's dir:PATH;"
        " if given, weights go nowhere else",
    )  # fmt: skip
    fed_server: str = _option(
        "", "HOST:PORT of the fed server as this machine reaches it; else where the server says"
    )

    def check(self) -> None:
        super().check()
        _require((self.client_id or 0) >= 0, "client_id", self.client_id, "0 or more")
        _check_timeout("connect_timeout", self.connect_timeout)
        patience = self.reconnect_timeout
        fine = math.isfinite(patience) and patience >= 0
        _require(fine, "reconnect_timeout", patience, "0 or more")
        if self.client_ids and self.client_id is not None:
            raise ConfigError("--client-id and --client-ids: give one of them")
        _ = self.hosted
        if self.tls_cert and not self.tls_ca:
            raise ConfigError("--tls-cert: without --tls-ca there is no TLS to show it in")
        KeepTensors.parse(self.keep_tensors)

    @property
    def hosted(self) -> list[int]:
        """The clients that this process hosts; none if it is one client.

        Raises:
            ConfigError: ``client_ids`` names none, or one twice.
        """
        ids: list[int] = []
        for part in self.client_ids.split(",") if self.client_ids else ():
            found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
            first, last = (int(n) for n in found.groups(found[1])) if found else (1, 0)
            ids += range(first, min(last, _MOST["clients"]) + 1)
            if last < first or len(set(ids)) != len(ids):
                raise ConfigError(f"--client-ids {self.client_ids}: give 0-99, or 0-9,20-29")
        return ids


@dataclass(frozen=True)
class SimulationNode(NodeConfig):
    """The machine of a simulation."""

    table: ClassVar[str] = "simulation"

    away: str = _option(
        "", "comma-separated CLIENT:ROUND[.STEP][-BACK], from 0: a client that is lost in a round,"
        " before that step, and takes part again in round BACK",
    )  # fmt: skip


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{flag(name)} {value}: must be {wanted}")


def _check_timeout(name: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, name, value, "a number above 0")


def _check_choices(config: Any) -> None:
    for spec in dataclasses.fields(config):
        choices, value = spec.metadata["choices"], getattr(config, spec.name)
        _require(not choices or value in choices, spec.name, value, " or ".join(choices))
