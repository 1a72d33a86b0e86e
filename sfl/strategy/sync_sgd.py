"""Synchronous SGD: the gradients of all clients make one update per step."""

from collections.abc import Mapping

from torch import Tensor

from sfl.archive.spool import EVERYONE, Answer, Spool
from sfl.config import RunConfig
from sfl.files.torch_file import encode_state
from sfl.files.torch_reader import Buffer
from sfl.model.segment import Segment
from sfl.strategy.aggregate import fed_avg
from sfl.values import Position
from sfl.wire.driver import Gate


class GradientPool:
    """Collects a step's gradients; when all clients' are there, it updates the whole model.

    The step's gradient is the mean over the samples of all clients' batches, as in one large batch;
    with equal aggregation weights, the mean over clients. It is summed in client order, in float64.
    """

    def __init__(
        self, run: RunConfig, model: Segment, num_steps: Mapping[int, int], spool: Spool
    ) -> None:
        """``num_steps``: of each client in the round; clients that have finished are left out.

        The ``spool`` keeps the parameters after each update, for repeated steps.
        """
        self._equal = run.aggregation_weights == "equal"
        self._model = model
        self._num_steps = dict(num_steps)
        self._spool = spool
        self._num_given = dict.fromkeys(num_steps, 0)
        self._given: dict[int, tuple[Mapping[str, Tensor], int]] = {}
        self._updates = 0
        self._parameters = b""  # the file of the parameters after the last update

    def add(self, client: int, grads: Mapping[str, Tensor], num_samples: int) -> None:
        """Add a client's gradients of the current step; update if they are the last."""
        self._given[client] = grads, 1 if self._equal else num_samples
        self._num_given[client] += 1
        self._update_if_complete()

    def num_given(self, client: int) -> int:
        """Return the number of steps for which a client has given gradients."""
        return self._num_given[client]

    def drop(self, client: int) -> None:
        """Expect no further gradients from a client; keep those that it gave."""
        self._num_steps[client] = self._num_given[client]
        self._update_if_complete()

    def _num_due(self) -> int:
        return sum(steps > self._updates for steps in self._num_steps.values())

    def _update_if_complete(self) -> None:
        if not self._given or len(self._given) < self._num_due():
            return
        states, weights = zip(*(self._given[k] for k in sorted(self._given)), strict=True)
        self._model.set_gradients(fed_avg(states, weights))
        self._model.update()
        self._parameters = encode_state(self._model.parameters())
        self._spool.put(_of_everyone(self._updates), Answer(self._parameters, {}))
        self._given = {}
        self._updates += 1

    def has_updated(self, step: int) -> Gate:
        """Return a gate that opens when this step's update is made, or no client is left."""
        return lambda: self._updates > step or self._num_due() == 0

    def answer(self, step: int) -> Buffer:
        """Return the file of the parameters after this step's update."""
        earlier = self._spool.get(_of_everyone(step)) if step < self._updates - 1 else None
        return earlier.data if earlier else self._parameters


def _of_everyone(step: int) -> Position:
    return Position(step=step, client=EVERYONE)
