"""Gradients of all clients, brought together into one update a step: synchronous SGD."""

from collections.abc import Mapping

from torch import Tensor

from sfl.aggregate import fed_avg
from sfl.config import RunConfig
from sfl.driver import Gate
from sfl.segment import Segment
from sfl.tensors import encode_state


class GradientPool:
    """The gradients of a step, until everyone's are there; then one update of the whole model.

    The step's gradient is the mean over the samples of all clients' batches, as if they were one
    large batch, unless clients weigh equally. Summed in client order, in float64.
    """

    def __init__(self, run: RunConfig, model: Segment, num_steps: Mapping[int, int]) -> None:
        """``num_steps``: of each client that takes part; the shorter ones fall away."""
        self._equal = run.aggregation_weights == "equal"
        self._model = model
        self._num_steps = num_steps
        self._given: dict[int, tuple[Mapping[str, Tensor], int]] = {}
        self._updates = 0
        self.parameters = b""  # the file of the parameters after the last update

    def add(self, client: int, grads: Mapping[str, Tensor], num_samples: int) -> None:
        """Add a client's gradients of the step that is open; the last one makes the update."""
        self._given[client] = grads, 1 if self._equal else num_samples
        due = sum(steps > self._updates for steps in self._num_steps.values())
        if len(self._given) < due:
            return
        states, weights = zip(*(self._given[k] for k in sorted(self._given)), strict=True)
        self._model.set_gradients(fed_avg(states, weights))
        self._model.update()
        self.parameters = encode_state(self._model.parameters())
        self._given = {}
        self._updates += 1

    def has_updated(self, step: int) -> Gate:
        """Return what opens when this step's update has been made."""
        return lambda: self._updates > step
