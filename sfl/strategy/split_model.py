"""A run's model, built for its data and cut: its segments and the specs of their tensors."""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sfl.data.client_data import batch_sizes
from sfl.errors import ConfigError
from sfl.files.torch_file import (
    StateSpec,
    TensorSpec,
    are_finite,
    state_spec,
)
from sfl.model import structure
from sfl.model.blocks import Entries, check_no_shared_weights, copied, freeze, names_of
from sfl.model.fusion import Fusion, Joint
from sfl.model.segment import Segment
from sfl.model.topology import Holder, Segments, joined
from sfl.model.training import Training
from sfl.model.trial import CPU, Trial, sample_specs, where_to_cut
from sfl.model.zoo import build, split
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange

# Limits of a batch in evaluation: samples, and bytes of its activations at the cut.
MAX_EVALUATION_BATCH = 256
MAX_EVALUATION_BYTES = 8 * 2**20


class SplitModel:
    """A run's model, split into segments, with initial weights.

    ``sfl.model.topology`` says which party holds each segment. For schemes without a cut, one
    segment is the whole model.

    Raises:
        ConfigError: the model cannot be built or cut like this.
    """

    def __init__(
        self,
        recipe: Recipe,
        input_shape: tuple[int, ...],
        num_classes: int,
        class_weights: tuple[float, ...] = (),
        *,
        client: int | None = None,
    ) -> None:
        """``client``: whose model it is, if clients have models of their own; None: the leader."""
        run = recipe.run
        client = recipe.leader(0) if client is None else client
        spec, cuts = recipe.party(client)

        def build_it() -> nn.Sequential:
            return build(spec, input_shape, num_classes, seed=recipe.model_seed(client))

        model = build_it()
        self.block_names = [name for name, _ in model.named_children()]
        described = structure.describe(model)
        self._structure: Callable[[], tuple[str, ...]] = lambda: structure.digests(
            described, lambda: structure.describe(build_it())
        )
        bounds = [0, *cuts, len(model)]
        for index in recipe.frozen:
            freeze(list(model)[bounds[index] : bounds[index + 1]])
        self.recipe = recipe
        self.cuts = cuts if recipe.scheme.exchange is Exchange.CUT else ()
        if not 0 <= cuts[0] <= cuts[-1] <= len(model) or {0, len(model)} & set(self.cuts):
            raise ConfigError(
                f"--cut {run.cut}: --scheme {run.scheme} needs blocks on both sides;"
                f" {recipe.model_name(client)} has {len(model)}: {', '.join(names_of(model))}"
            )
        rows = split(model, *self.cuts)
        names = [*recipe.segments][: len(rows)]  # of a party's own model, the first one counts
        check_no_shared_weights(rows)
        states = (item for row in rows for item in row.state_dict().items())
        self._masks = {name: tensor for name, tensor in states if not are_finite([tensor])}
        self.entries = Entries.of(rows)
        if recipe.frozen and not self.entries.trained:
            raise ConfigError(f"--freeze {run.freeze}: leaves nothing of the model to train")
        self._segments = dict(zip(names, rows, strict=True))  # these keep the initial weights
        self._unjoined = rows
        self._first_blocks = dict(zip(names, (0, *self.cuts), strict=True))
        self.input_shape, self.num_classes = input_shape, num_classes
        self._training = replace(recipe.training, class_weights=class_weights, cuts=cuts)
        self.specs: dict[str, StateSpec] = {
            name: state_spec(s.state_dict()) for name, s in self._segments.items()
        }
        self._cut_samples = sample_specs(rows, self._training, input_shape, num_classes)
        self._crossing = self._cut_samples  # what crosses the cuts between parties
        largest = max((sample.num_bytes for sample in self._cut_samples), default=1)
        fit = MAX_EVALUATION_BYTES // max(largest, 1)
        # Clients that evaluate a batch together know their own activations only.
        most = run.batch_size if recipe.joins else fit
        self.evaluation_batch = max(1, min(MAX_EVALUATION_BATCH, most))
        self.joint: Joint | None = None  # what joins in front of the server's segment
        self._parties: Mapping[int, SplitModel] = {}  # the models of other clients, if joined

    @classmethod
    def of_data(
        cls, recipe: Recipe, data: Mapping[str, Any], most_bytes: float = math.inf
    ) -> "SplitModel":
        """Return a run's model for a record of its clients' data; ``most_bytes``: as ``join``."""
        shape, weights = tuple(data["input_shape"]), tuple(data.get("class_weights", ()))
        split = cls(recipe, shape, len(data["classes"]), weights)
        if recipe.joins:
            split.join(cls.of_clients(recipe, data), most_bytes)
        return split

    @classmethod
    def of_clients(cls, recipe: Recipe, data: Mapping[str, Any]) -> dict[int, "SplitModel"]:
        """Return each client's model, where they have models of their own."""
        parts = {int(k): part for k, part in data["parts"].items()}
        return {
            k: cls(recipe, tuple(part["input_shape"]), part["num_classes"], client=k)
            for k, part in parts.items()
        }

    def join(self, parties: Mapping[int, "SplitModel"], most_bytes: float = math.inf) -> None:
        """Let the segment behind the clients' begin with the fusion of all their activations.

        ``most_bytes``: of the fusion's weights.

        Raises:
            ConfigError: they cannot be joined, or the fusion is larger.
        """
        run, name = self.recipe.run, [*self._segments][1]
        seed = self.recipe.training.seed
        self._parties = parties
        for party in parties.values():  # behind the fusion all have the activations of this model
            party._crossing = [party._crossing[0], *self._crossing[1:]]
        self.joint = Joint({k: party.features_sample(0) for k, party in parties.items()})
        wanted = self.features_sample(0).shape
        with torch.device("meta"):  # takes no memory
            sized = Fusion(run.fusion, self.joint.shapes, wanted, seed)
        if (needed := sum(p.numel() * p.itemsize for p in sized.parameters())) > most_bytes:
            shapes = ", ".join(str(list(shape)) for shape in self.joint.shapes)
            raise ConfigError(
                f"--fusion {run.fusion}: the projection of the clients' activations ({shapes}) to"
                f" {list(wanted)} takes {needed / 1e6:,.0f} MB; cut the models where these are"
                " smaller"
            )
        fusion = Fusion(run.fusion, self.joint.shapes, wanted, seed)
        if 1 in self.recipe.frozen:
            freeze([fusion])
        blocks = [("fusion", fusion), *self._segments[name]._modules.items()]
        self._segments[name] = nn.Sequential(OrderedDict(blocks))
        for further in [*self._segments][2:]:  # draws as if the model were cut once
            self._first_blocks[further] += 1
        self.entries = Entries.of(self._rows)
        self.specs[name] = state_spec(self._segments[name].state_dict())

    @property
    def class_weights(self) -> tuple[float, ...]:
        """The class weights of the training loss; empty if it is not weighted."""
        return self._training.class_weights

    @property
    def _rows(self) -> list[nn.Sequential]:
        return list(self._segments.values())

    def _segment(self, name: str, device: torch.device, training: Training) -> Segment:
        return Segment(self.blocks(name), self._first_blocks[name], training, device)

    def blocks(self, name: str) -> nn.Sequential:
        """Return a copy of a segment's blocks, with initial weights."""
        return copied(self._segments[name], self._first_blocks[name])

    def trial(
        self, *, whole: bool = False, devices: Mapping[Holder, torch.device] | None = None
    ) -> Trial:
        """Return a trial with copies of the segments, or of the ``whole`` model in one piece.

        ``devices``: those of the parties that do not compute on the CPU, of segments alone.
        """
        blocks = OrderedDict(item for row in self._unjoined for item in row._modules.items())
        own = [(devices or {}).get(holder, CPU) for holder in self.recipe.segments.values()]
        return Trial(
            [nn.Sequential(blocks)] if whole else self._unjoined,
            self._training,
            self.input_shape,
            self.num_classes,
            cuts=self.cuts if whole else (),
            samples=() if whole else self._cut_samples,
            devices=() if whole else own,
        )

    def where_to_cut(self) -> str:
        """Return the end of an error message: where else the model can be cut."""
        return where_to_cut(self._unjoined, self._training, self.input_shape, self.num_classes)

    def held_by(self, holder: Holder) -> list[str]:
        """Return the names of a party's segments; without a cut, each party has the whole model."""
        held = self.recipe.segments  # of a party's own model, those behind may be missing
        return [name for name in self.specs if not self.cuts or held[name] is holder]

    def segments(self, holder: Holder, device: torch.device) -> Segments:
        """Return a party's segments, with initial weights and optimisers."""
        mu = self.recipe.run.fedprox_mu if holder is Holder.CLIENT else 0.0
        training = replace(self._training, proximal_mu=mu)
        return Segments({n: self._segment(n, device, training) for n in self.held_by(holder)})

    @functools.cached_property
    def structure(self) -> tuple[str, ...]:
        """The digests of the model, see ``sfl.model.structure``."""
        return self._structure()

    def changing(self, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the tensors of a state, except for constant masks of -inf.

        Those are tensors that are not finite and equal the initial ones.
        """
        for name, tensor in state.items():
            began = self._masks.get(name)
            if began is None or not torch.equal(tensor.cpu(), began):
                yield tensor

    @property
    def front_spec(self) -> StateSpec:
        """The spec of the weights of the client-side model, as they are sent."""
        return {
            n: spec for name in self.held_by(Holder.CLIENT) for n, spec in self.specs[name].items()
        }

    @property
    def back_spec(self) -> StateSpec:
        """The spec of the weights of the server-side model."""
        return {
            n: spec for name in self.held_by(Holder.SERVER) for n, spec in self.specs[name].items()
        }

    def initial(self, *holders: Holder) -> dict[str, dict[str, Tensor]]:
        """Return the initial weights of these parties' segments."""
        held = self.recipe.segments
        return {n: dict(s.state_dict()) for n, s in self._segments.items() if held[n] in holders}

    def front_state(self) -> dict[str, Tensor]:
        """Return the initial weights of the client-side model."""
        return joined(self.initial(Holder.CLIENT))

    def by_segment(self, front: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the weights of the client-side model by segment."""
        return {
            name: {n: front[n] for n in self.specs[name]} for name in self.held_by(Holder.CLIENT)
        }

    @property
    def is_in_eval(self) -> bool:
        """Whether all modules were built in evaluation mode."""
        return not any(m.training for row in self._rows for b in row for m in b.modules())

    @property
    def parameters_spec(self) -> StateSpec:
        """The spec of all trained parameters, and of their gradients."""
        return {
            n: s for row in self.specs.values() for n, s in row.items() if n in self.entries.trained
        }

    def of_party(self, client: int) -> "SplitModel":
        """Return a client's model: this one, unless clients have models of their own."""
        is_own = client != self.recipe.leader(client)
        return self._parties[client] if is_own else self

    def features_sample(self, link: int) -> TensorSpec:
        """Return the spec of one sample's activations at a cut."""
        return self._crossing[link]

    def features_spec(self, batch: int, link: int = 0) -> TensorSpec:
        """Return the spec of a batch's activations at a cut, and of their gradients."""
        return self.features_specs(batch)[link]

    def features_specs(self, batch: int) -> list[TensorSpec]:
        """Return the specs of ``features_spec`` at all cuts."""
        return [TensorSpec((batch, *sample.shape), sample.dtype) for sample in self._crossing]

    @property
    def sample_bytes(self) -> int:
        """The bytes of one sample's activations at all cuts."""
        return sum(sample.num_bytes for sample in self._crossing)

    def evaluation_sizes(self, num_samples: int) -> Iterator[int]:
        """Yield the batch sizes for evaluating so many samples."""
        if self.recipe.joins and num_samples:  # no client is told the loss of a single sample
            yield from batch_sizes(num_samples, self.evaluation_batch)
            return
        for start in range(0, num_samples, self.evaluation_batch):
            yield min(self.evaluation_batch, num_samples - start)

    @property
    def largest_evaluation_batch(self) -> int:
        return self.evaluation_batch + self.recipe.joins
