"""A run's model, cut for its data: segments, what passes the cut, and what may be accepted."""

import copy
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.models import build, model_spec, split
from sfl.protocol import Limits, MessageType
from sfl.segment import Segment
from sfl.tensors import StateSpec, TensorSpec, max_file_bytes, state_spec

# Batches of validation and test: as many samples as this, or as fit into so many bytes at the cut.
MAX_EVALUATION_BATCH = 256
MAX_EVALUATION_BYTES = 8 * 2**20


def resolve_cut(run: RunConfig, allowed: Collection[str] | None = None) -> int:
    """Return where the run's model is cut: the user's index, or the model's own.

    Raises:
        ConfigError: no such model, or a user's own model without ``--cut``.
    """
    cut = run.cut if run.cut is not None else model_spec(run.model, allowed).cut
    if cut is None:
        raise ConfigError(f"--model {run.model} is your own: say with --cut where to cut it")
    return cut


class SplitModel:
    """The model of a run, split into its segments' blocks, with initial weights.

    Raises:
        ConfigError: the model cannot be built or cut so.
    """

    def __init__(
        self,
        run: RunConfig,
        input_shape: tuple[int, ...],
        num_classes: int,
        allowed: Collection[str] | None = None,
    ) -> None:
        model = build(model_spec(run.model, allowed), input_shape, num_classes, seed=run.seed)
        self.cut = resolve_cut(run, allowed)
        if not 0 < self.cut < len(model):
            raise ConfigError(
                f"--cut {self.cut}: --scheme {run.scheme} needs blocks on both sides;"
                f" {run.model} has {len(model)}: {', '.join(n for n, _ in model.named_children())}"
            )
        self._front, self._back = split(model, self.cut)  # these keep the initial weights
        self.num_classes = num_classes
        self._run = run
        self.front_spec: StateSpec = state_spec(self._front.state_dict())
        self.back_spec: StateSpec = state_spec(self._back.state_dict())
        self._cut_sample = self._find_cut_sample(input_shape)
        fit = MAX_EVALUATION_BYTES // max(self._cut_sample.num_bytes, 1)
        self.evaluation_batch = max(1, min(MAX_EVALUATION_BATCH, fit))

    def front(self, device: torch.device) -> Segment:
        """Return a client-side model with the initial weights and an optimiser."""
        return Segment(copy.deepcopy(self._front), 0, self._run, device)

    def back(self, device: torch.device) -> Segment:
        """Return a server-side model with the initial weights and an optimiser."""
        return Segment(copy.deepcopy(self._back), self.cut, self._run, device)

    def front_state(self) -> dict[str, Tensor]:
        """Return the front's initial weights."""
        return dict(self._front.state_dict())

    def back_state(self) -> dict[str, Tensor]:
        """Return the back's initial weights."""
        return dict(self._back.state_dict())

    def _find_cut_sample(self, input_shape: tuple[int, ...]) -> TensorSpec:
        """Return the spec of one sample at the cut, and see that the back takes it."""
        cpu = torch.device("cpu")
        try:
            z = self.front(cpu).evaluate(torch.zeros(1, *input_shape))
            logits = self.back(cpu).evaluate(z)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"the model does not take samples of shape {list(input_shape)}: {reason}"
            ) from error
        if logits.shape != (1, self.num_classes):
            raise ConfigError(
                f"the model's output is {list(logits.shape)} for one sample;"
                f" wanted are {self.num_classes} logits"
            )
        return TensorSpec(tuple(z.shape[1:]), z.dtype)

    def features_spec(self, batch: int) -> TensorSpec:
        """Return the spec of the activations, and of their gradients, of a batch."""
        return TensorSpec((batch, *self._cut_sample.shape), self._cut_sample.dtype)

    def labels_spec(self, batch: int) -> TensorSpec:
        """Return the spec of the labels of a batch."""
        return TensorSpec((batch,), torch.int64)

    def evaluation_sizes(self, num_samples: int) -> Iterator[int]:
        """Yield the sizes of the batches in which samples are evaluated."""
        for start in range(0, num_samples, self.evaluation_batch):
            yield min(self.evaluation_batch, num_samples - start)

    def client_limits(self) -> Limits:
        """Return what a client accepts from its server."""
        weights = max_file_bytes(self.front_spec.values())
        return Limits(
            payload_bytes={
                MessageType.TRAINING_GRADS: self._max_features_bytes(self._run.batch_size + 1),
                MessageType.SEND_MODEL: weights,
                MessageType.SEND_AGGREGATED_MODEL: weights,
            }
        )

    def server_limits(self) -> Limits:
        """Return what the server accepts from a client."""
        step, evaluation = self._run.batch_size + 1, self.evaluation_batch
        return Limits(
            payload_bytes={
                MessageType.TRAINING_LABELS: max_file_bytes([self.labels_spec(step)]),
                MessageType.TRAINING_FEATURES: self._max_features_bytes(step),
                MessageType.VALIDATION_LABELS: max_file_bytes([self.labels_spec(evaluation)]),
                MessageType.VALIDATION_FEATURES: self._max_features_bytes(evaluation),
                MessageType.SEND_MODEL: max_file_bytes(self.front_spec.values()),
            }
        )

    def _max_features_bytes(self, batch: int) -> int:
        return max_file_bytes([self.features_spec(batch)])
