"""What a page needs to take part in a run of another server: the front's graphs, weights, batches.

The site asks the server for the run's configuration, as ``run_client.py --check`` does, and
prepares what JavaScript does not compute: graphs, digests, templates, the order of batches. What a
page cannot do is refused here, by name.
"""

import dataclasses
import functools
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from experiments.web.pages import JSON, ONNX, Answer, Route
from experiments.web.question import Question
from experiments.web.step_graph import Graphs, step_graphs, why_not
from experiments.web.templates import MOST_BYTES, state_template
from sfl import __version__, seeds
from sfl.archive.records import MAX_CLASSES
from sfl.config import RunConfig
from sfl.conversation.join import HERE
from sfl.data.augment import NONE
from sfl.data.client_data import DatasetSpec, batch_indices, held_out, normalised
from sfl.data.datasets import DATASETS, dataset_of
from sfl.data.partition import OWN
from sfl.errors import ConfigError, SflError, quoted, reason_of
from sfl.files.torch_file import encode_state, max_file_bytes
from sfl.model.class_weights import BALANCED
from sfl.model.structure import weights_checksum
from sfl.model.topology import Holder
from sfl.model.zoo import MODELS
from sfl.nodes import ClientNode
from sfl.options import CAN_GROW
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.transport.tokens import tokens_of
from sfl.weights.stores import SOCKET

MOST_SAMPLES: Final = 100_000  # of a page, and in a round's order
MOST_INPUTS: Final = 3 * 64 * 64  # of a sample: a server of ill will names no larger model
MOST_CLIENT: Final = 10**6
_MODELS: Final = ("mlp", "lenet5")
_OPTIMIZERS: Final = ("adam", "sgd")


def routes(address: str, node: ClientNode) -> dict[str, Route]:
    """Return the routes by which a page takes part in the run of the server at an address."""
    desk, tokens = _Desk(address, node), tokens_of(node)
    client = {"client": tokens.only_client if tokens else None}
    return {
        "/training.json": lambda query: _json(_told(desk, client)),
        "/training/forward.onnx": lambda query: Answer(ONNX, desk.run().graphs.forward),
        "/training/step.onnx": lambda query: Answer(ONNX, desk.run().graphs.step),
        "/training/front.pt": lambda query: Answer(ONNX, desk.run().initial),
        "/training/structure": lambda query: _json(
            desk.run().structure(_number(query, "classes", 1, MAX_CLASSES))
        ),
        "/training/split": lambda query: _json(desk.run().parts(*_client_and_samples(query))),
        "/training/order": lambda query: _json(
            desk.run().order(*_client_and_samples(query), _number(query, "round", 0, 2**31 - 1))
        ),
    }


def _told(desk: "_Desk", more: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page knows of the run, or the problem: a page asks until there is a run."""
    try:
        return desk.ask().described() | dict(more)
    except SflError as error:
        problem = reason_of(error).partition("; see --server")[0]  # a page has no such options
        return {"problem": problem}


def _json(value: object) -> Answer:
    return Answer(JSON, json.dumps(value).encode())


def _client_and_samples(query: Mapping[str, str]) -> tuple[int, int]:
    return _number(query, "client", 0, MOST_CLIENT), _number(query, "samples", 1, MOST_SAMPLES)


def _number(query: Mapping[str, str], name: str, least: int, most: int) -> int:
    """Return a parameter of a request.

    Raises:
        ConfigError: it is no number in this range.
    """
    text = query.get(name, "")
    plain = text.isascii() and text.isdigit() and len(text) <= 12
    if not plain or not least <= int(text) <= most:
        raise ConfigError(f"{name}={quoted(text, 40)}: give a number from {least} to {most}")
    return int(text)


def why_a_page_cannot(run: RunConfig, fed: str = HERE) -> str:
    """Return why a page cannot be a client of a run; "" if it can.

    Only names that come with SFL are looked up: nothing of the server's is imported.
    """
    wanted: dict[str, tuple[bool, str]] = {
        "partition": (run.partition == OWN, OWN),
        "model": (run.model in _MODELS, " or ".join(_MODELS)),
        "dataset": (run.dataset in DATASETS, "a data set that comes with SFL"),
        "task": (run.task == "classification", "classification"),
        "topology": (run.topology in ("", "vanilla"), "vanilla"),
        "optimizer": (run.optimizer in _OPTIMIZERS, " or ".join(_OPTIMIZERS)),
        "optimizer_state": (run.optimizer_state == "reset", "reset"),
        "freeze": (not run.freeze, "nothing frozen"),
        "weights": (run.weights == SOCKET and fed == HERE, "weights over the same connection"),
    }
    for name, (holds, what) in wanted.items():
        if not holds:
            value = quoted(str(getattr(run, name)), 60)
            return f"a page takes part in runs with {what}; this one has --{_flag(name)} {value}"
    spec = dataset_of(run)
    if (named := run.augment or spec.augment) not in ("", NONE):
        return (
            f"a page does not augment images; this run has --augment {named}: give --augment none"
        )
    if spec.input_shape and torch.Size(spec.input_shape).numel() > MOST_INPUTS:
        return f"samples of {list(spec.input_shape)} are too large for a page"
    return ""


def _flag(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class TrainedRun:
    """A run that pages can take part in, prepared once.

    Raises (from ``of``):
        ConfigError: a page cannot; the line says why.
    """

    recipe: Recipe
    spec: DatasetSpec
    split: SplitModel
    graphs: Graphs
    initial: bytes  # the front's file at the start

    @classmethod
    def of(cls, run: RunConfig, fed: str = HERE) -> "TrainedRun":
        if why := why_a_page_cannot(run, fed):
            raise ConfigError(why)
        recipe = Recipe.of(run, ())
        if (
            recipe.scheme.exchange is not Exchange.CUT
            or recipe.scheme.pooled
            or len(recipe.cuts) != 1
        ):
            raise ConfigError(
                f"a page takes part in runs with one cut; this one has --scheme {run.scheme}"
                f" --cut {quoted(str(run.cut), 40)}"
            )
        if recipe.cuts[0] != MODELS[run.model].cut:
            raise ConfigError(
                f"a page takes part with {run.model} cut at {MODELS[run.model].cut}; this run has"
                f" --cut {recipe.cuts[0]}"
            )
        spec = normalised(dataset_of(run), run)
        split = SplitModel(recipe, spec.input_shape, len(spec.classes))
        largest = split.features_spec(max(run.batch_size + 1, split.evaluation_batch)).num_bytes
        if largest > MOST_BYTES:
            raise ConfigError(f"--batch-size {run.batch_size} makes steps too large for a page")
        front = split.blocks(split.held_by(Holder.CLIENT)[0])
        if why := why_not(front):
            raise ConfigError(f"a page cannot train this front: {why}")
        graphs = step_graphs(front, spec.input_shape)
        return cls(recipe, spec, split, graphs, encode_state(split.front_state()))

    def described(self) -> dict[str, Any]:
        """Return what ``page/training.js`` knows of the run."""
        run, split, scheme = self.recipe.run, self.split, self.recipe.scheme
        front = split.front_state()
        return {
            "config": dataclasses.asdict(run),
            "fronts": scheme.fronts.name.lower(),
            "input_shape": list(split.input_shape),
            "cut_shape": list(split.features_sample(0).shape),
            "classes": list(self.spec.classes),
            "mean": _each(self.spec.mean, split.input_shape[0]),
            "std": _each(self.spec.std, split.input_shape[0]),
            "parameters": list(front),
            "template": state_template(split.front_spec),
            "weights": weights_checksum(front),
            "evaluation_batch": split.evaluation_batch,
            "counts_classes": run.class_weights == BALANCED,
            "optimizer": {
                "kind": run.optimizer,
                "momentum": run.momentum,
                "weight_decay": run.weight_decay,
                "clip_norm": run.clip_norm,
                "proximal_mu": run.fedprox_mu,
            },
            "most_samples": MOST_SAMPLES,
            "most_gradients": max_file_bytes([split.features_spec(run.batch_size + 1)]),
            "may_differ": sorted(CAN_GROW),
            "worst": self.graphs.worst,
            "sfl": __version__,
        }

    def structure(self, num_classes: int) -> list[str]:
        """Return the digests of the model for so many classes."""
        return list(_structure(self.recipe.run, self.split.input_shape, num_classes))

    def parts(self, client: int, num_samples: int) -> dict[str, list[int]]:
        """Return which of a client's own samples it trains on, and which are held out."""
        drawn = seeds.generator(self.recipe.run.seed, seeds.VALIDATION, client)
        order = torch.randperm(num_samples, generator=drawn).tolist()
        count = held_out(num_samples)
        return {"train": order[count:], "validation": order[:count]}

    def order(self, client: int, num_samples: int, round_index: int) -> dict[str, Any]:
        """Return the batches of a client's round, as indices, and its learning rate.

        Raises:
            ConfigError: they are too many for one answer.
        """
        run = self.recipe.run
        if num_samples * run.local_epochs > 10 * MOST_SAMPLES:
            raise ConfigError(
                f"{num_samples} samples and --local-epochs {run.local_epochs}: too many"
            )
        drawn = batch_indices(num_samples, run, round_index=round_index, client=client)
        rate = self.recipe.training.learning_rate(round_index)
        return {"batches": [batch.tolist() for batch in drawn], "lr": rate}


@functools.lru_cache(maxsize=8)
def _structure(run: RunConfig, input_shape: tuple[int, ...], num_classes: int) -> tuple[str, ...]:
    return SplitModel(Recipe.of(run, ()), input_shape, num_classes).structure


def _each(figure: float | tuple[float, ...], channels: int) -> list[float]:
    return list(figure) if isinstance(figure, tuple) else [figure] * channels


@dataclass
class _Desk:
    """Knows the server's run, and prepares it when it is another one."""

    address: str
    node: ClientNode
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _question: "Question | None" = None  # the last one
    _preparing: threading.Lock = field(default_factory=threading.Lock)
    _found: tuple[RunConfig, TrainedRun] | None = None

    def ask(self) -> TrainedRun:
        """Ask the server which run it has; who comes meanwhile or just after gets the same answer.

        Raises:
            ConfigError, RunError, PeerFailed, ProtocolError: it is not there, refuses, or has a run
                in which a page cannot take part.
        """
        with self._lock:
            if self._question is None or self._question.is_old:
                self._question = Question(self.address, self.node)
            question = self._question
        welcome = question.answer()
        with self._preparing:
            if self._found is None or self._found[0] != welcome.run:
                self._found = welcome.run, TrainedRun.of(welcome.run, welcome.fed)
            return self._found[1]

    def run(self) -> TrainedRun:
        """Return the run that was found; ask if none was.

        Raises:
            ConfigError, RunError, PeerFailed, ProtocolError: as ``ask``.
        """
        return self._found[1] if self._found else self.ask()
