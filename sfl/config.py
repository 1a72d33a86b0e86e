"""What a run computes: ``RunConfig``, the same on every machine.

The dataclass is the command line (``sfl.options`` derives it), the record and the documentation. It
travels from the server to each client in ``REGISTERED``; the options of ``sfl.nodes`` never do.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sfl.errors import ConfigError, counted
from sfl.values import KeepModels, KeepTensors, StopWhen

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# More than anybody runs; a configuration may come from somebody who means harm.
MOST = {"clients": 100_000, "rounds": 2**31 - 1, "local_epochs": 10_000, "batch_size": 2**20}


def option(default: Any, text: str, choices: Sequence[str] = (), *, form: str = "") -> Any:
    """Return the field of an option, with its help text.

    ``form``: how the help shows a value; by default, its type.
    """
    about = {"help": text, "choices": choices, "form": form}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class RunConfig:
    """What a run computes. The server's; every client receives it when it registers."""

    table: ClassVar[str] = "run"

    scheme: str = option(
        "sflv1",
        "who shares what: {names} (see docs/schemes)",
    )
    model: str = option("lenet5", "{names}, or your own package.module:function")
    cut: int | str | None = option(
        None, "number of top-level blocks in front of the cut, or of each of several as 3,5; the"
        " model's own if not given", form="CUT[,CUT...]",
    )  # fmt: skip
    topology: str = option(
        "", "which party holds each segment: {names} (see docs/topologies.md); if not given, what"
        " fits the number of cuts",
    )  # fmt: skip
    init_checksum: str = option(
        "", "checksum of the weights that --init names, noted when a run starts from some; given,"
        " it refuses others",
    )  # fmt: skip
    task: str = option("classification", "what is predicted, with its loss and metrics: {names}")
    tasks: str = option(
        "", "with --topology multi-task, what each server predicts, first the main server: {names},"
        " or the name of a further column y_NAME of own data", form="TASK,TASK[,...]",
    )  # fmt: skip
    task_weights: str = option(
        "", "weights of the losses of --tasks in their sum, as 1,0.5; if not given, each 1"
    )
    dataset: str = option("mnist-5k", "{names}, or your own package.module:function")
    image_size: int = option(0, "side of the images in pixels; 0: the data set's own")
    augment: str = option(
        "", "random changes to training images: none, or some of {names}, joined by +; the data"
        " set's own if not given",
    )  # fmt: skip
    normalize: str = option(
        "", "mean=M,std=S that samples are normalised by, bytes divided by 255 before: one number"
        " for all channels, or one for each as 0.5/0.4/0.3; the data set's own if not given",
    )  # fmt: skip
    partition: str = option(
        "iid",
        "who has which training samples: own, or as dealt out by {names}, with numbers behind a"
        " colon where it takes some (see docs/options.md)",
    )
    fusion: str = option(
        "concat", "with --topology vertical, how the clients' activations are joined: {names}"
    )
    label_client: int = option(0, "with --topology vertical, the client that has the labels")
    party_models: str = option(
        "", "with --topology vertical, the model that each client's first segment is of, as"
        " lenet5,mlp; --model if not given",
    )  # fmt: skip
    clients: int = option(3, "number of clients; the run starts when all are there")
    max_clients: int = option(
        0,
        "more clients that may join before the start, with --partition own; 0: none, as --clients",
    )
    participation: float = option(1.0, "share of the clients that is drawn for each round")
    rounds: int = option(10, "number of global rounds, each ending in one averaging")
    test_every: int = option(
        0, "evaluate the test set after every N-th round as well as the last; 0: the last alone"
    )  # fmt: skip
    stop_when: str = option(
        "", "METRIC:patience=N[,min_delta=X], as val_loss:patience=5: end after the round in which"
        " this metric of rounds.csv has not become better for N rounds",
    )  # fmt: skip
    local_epochs: int = option(1, "passes over a client's data in a round")
    batch_size: int = option(32, "samples in a step")
    optimizer: str = option("adam", "on both sides of the cut: {names}")
    lr: float = option(0.001, "learning rate")
    lr_schedule: str = option(
        "constant", "the learning rate by rounds, options behind a colon: {names}"
    )
    momentum: float = option(0.0, "momentum, of an optimizer that takes one")
    weight_decay: float = option(0.0, "L2 penalty added to the gradients")
    optimizer_state: str = option(
        "reset", "optimisers begin each round fresh, or keep their state", ("reset", "keep")
    )
    lr_rounds: int = option(
        0, "rounds over which the schedule runs, kept when a run goes on; 0: as --rounds"
    )
    clip_norm: float = option(0.0, "clip each half's gradient to this norm; 0: do not")
    class_weights: str = option(
        "none", "weights of the classes in the training loss: none, balanced (clients then tell"
        " the server how many samples they have of each), or 1,2.5,... for each class",
    )  # fmt: skip
    freeze: str = option(
        "", "segments that are not trained, as front or front,client_head: their weights and"
        " buffers stay as the run starts with them, in every scheme", form="SEGMENT[,SEGMENT...]",
    )  # fmt: skip
    fedprox_mu: float = option(0.0, "FedProx: pull of a client's weights to the round's start")
    server_order: str = option(
        "fixed", "clients that share a back: in drawn order, or as they come", ("fixed", "arrival")
    )
    aggregation: str = option(
        "fedavg", "how client-side and server-side models are averaged, options behind a colon:"
        " {names}",
    )  # fmt: skip
    aggregation_weights: str = option(
        "samples", "clients weigh by their training samples, or equally", ("samples", "equal")
    )
    weights: str = option(
        "socket", "how client-side weights travel: socket, dir:PATH or gs://BUCKET/PREFIX"
    )
    on_nonfinite: str = option(
        "reject", "NaN or infinity in what a peer sends: refuse it, or warn once a round",
        ("reject", "log"),
    )  # fmt: skip
    keep_tensors: str = option(
        "all", "rounds whose tensors stay on disk: all, last, every:N or none"
    )
    keep_models: str = option(
        "all", "rounds whose models stay on disk, beside what the run goes on from and what kept"
        " tensors are replayed with: all, last, every:N, or best[:METRIC], the best round so far by"
        " a metric of rounds.csv, val_loss if not given",
    )  # fmt: skip
    seed: int = option(0, "every random draw derives from it")
    run: str = option("", "name of the run and its folder; the start time if not given")

    def check(self) -> None:
        """Raise ``ConfigError`` for a value out of range; names are checked by their registries."""
        for name, most in MOST.items():
            value = getattr(self, name)
            require(1 <= value <= most, name, value, f"at least 1 and at most {most}")
        require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a number above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(0 < self.participation <= 1, "participation", self.participation, "in (0, 1]")
        for name in ("weight_decay", "clip_norm", "fedprox_mu"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, value, "0 or more")
        require(self.label_client >= 0, "label_client", self.label_client, "0 or more")
        require(0 <= self.image_size <= 4096, "image_size", self.image_size, "0 to 4096")
        require(self.lr_rounds >= 0, "lr_rounds", self.lr_rounds, "0 or more")
        require(self.test_every >= 0, "test_every", self.test_every, "0 or more")
        most = self.max_clients
        fine = most == 0 or self.clients <= most <= MOST["clients"]
        require(fine, "max_clients", most, "at least --clients")
        if most > self.clients and self.partition != "own":
            raise ConfigError(
                f"--max-clients {most}: --partition {self.partition} deals the data out to"
                f" {counted(self.clients, 'client')}; more can join with --partition own alone"
            )
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        check_choices(self)
        if self.run:
            wanted = "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
            require(bool(RUN_NAME.fullmatch(self.run)), "run", self.run, wanted)
        KeepTensors.parse(self.keep_tensors)
        KeepModels.parse(self.keep_models)
        StopWhen.parse(self.stop_when)

    @property
    def most_clients(self) -> int:
        """How many clients may register."""
        return max(self.clients, self.max_clients)


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raise ``ConfigError`` for an option whose value does not hold what is wanted."""
    if not holds:
        raise ConfigError(f"{flag(name)} {value}: must be {wanted}")


def check_choices(config: Any) -> None:
    """Raise ``ConfigError`` for a value that is none of its option's choices."""
    for spec in dataclasses.fields(config):
        choices, value = spec.metadata["choices"], getattr(config, spec.name)
        require(not choices or value in choices, spec.name, value, " or ".join(choices))
