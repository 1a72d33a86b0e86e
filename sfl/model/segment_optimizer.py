"""The optimiser of a segment: its learning rate, clipping, and its state as named tensors."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sfl.files.torch_file import TensorSpec, state_spec
from sfl.model.training import Training


class SegmentOptimizer:
    """The optimiser of consecutive blocks; blocks without parameters have none.

    torch's fused Adam matches the elements of a parameter, its gradient and its moments by memory
    order, and silently computes wrong results if their layouts differ. So all are made contiguous.
    """

    def __init__(self, blocks: nn.Sequential, first_block: int, training: Training) -> None:
        for parameter in blocks.parameters():
            # This also normalises strides of dimensions of size 1, which torch compares.
            parameter.data = parameter.data.reshape(-1).view(parameter.shape)
        self._blocks, self._first_block, self._training = blocks, first_block, training
        self.reset()

    def reset(self) -> None:
        """Replace the optimiser by a fresh one."""
        self.parameters = list(self._blocks.parameters())
        make = self._training.make_optimizer
        self._optimizer = make(self.parameters) if self.parameters else None

    @property
    def _groups(self) -> list[dict[str, float]]:
        return self._optimizer.param_groups if self._optimizer else []

    @property
    def rates(self) -> Sequence[float]:
        return [group["lr"] for group in self._groups]

    def set_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate

    def start_round(self, round_index: int) -> None:
        """Set the round's learning rate; reset the optimiser unless its state is kept."""
        if not self._training.keeps_optimizer:
            self.reset()
        self.set_rates([self._training.learning_rate(round_index)] * len(self._groups))

    def step(self) -> None:
        """Clip the gradients, and update the parameters."""
        if self._optimizer is None:
            return
        if self._training.clip_norm:
            for side in self.sides():
                nn.utils.clip_grad_norm_(side, self._training.clip_norm)
        for parameter in self.parameters:
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
            if parameter.grad is not None:
                parameter.grad = parameter.grad.resolve_neg().contiguous()
        self._optimizer.step()

    def sides(self) -> Iterator[list[nn.Parameter]]:
        """Yield the parameters between two of the run's cuts, from input to output, where any are.

        For schemes without a cut, a parameter on both sides of one counts in front of it.
        """
        inner = [min(max(c - self._first_block, 0), len(self._blocks)) for c in self._training.cuts]
        seen: set[nn.Parameter] = set()
        for start, end in itertools.pairwise([0, *inner, len(self._blocks)]):
            if parameters := [p for p in self._blocks[start:end].parameters() if p not in seen]:
                seen.update(parameters)
                yield parameters

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the optimiser's tensors, named ``<parameter>.<name>``, on the CPU."""
        if self._optimizer is None:
            return {}
        return {
            f"{index}.{name}": value.detach().cpu().clone()
            for index, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the optimiser by a fresh one with these tensors."""
        self.reset()
        if self._optimizer is None:
            return
        nested: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            index, _, name = key.partition(".")
            nested.setdefault(int(index), {})[name] = value.contiguous()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": nested, "param_groups": groups})

    def spec(self) -> dict[str, TensorSpec]:
        """Return the spec of ``state()`` after a step, by taking one on a copy."""
        blocks = copy.deepcopy(self._blocks).cpu()
        trial = SegmentOptimizer(blocks, self._first_block, self._training)
        for parameter in blocks.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trial.step()
        return state_spec(trial.state())
