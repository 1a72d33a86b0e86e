"""A part of the model with its optimiser: the arithmetic of a step, written once.

Sockets, simulation and replay all compute through ``Segment``; a step chains ``forward`` along the
segments and ``backward`` against it. Shapes: ``x`` (B, C, H, W), ``z`` (B, *cut), ``y`` (B,).
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfl import seeds
from sfl.config import RunConfig, unknown_name
from sfl.errors import RunError
from sfl.protocol import Position
from sfl.tensors import TensorSpec, state_spec

Parameters = Iterable[nn.Parameter]


def _adam(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=run.lr, weight_decay=run.weight_decay)


def _sgd(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[Parameters, RunConfig], torch.optim.Optimizer]] = {
    "adam": _adam,
    "sgd": _sgd,
}


def check_optimizer(name: str) -> None:
    """Raise ``ConfigError`` if there is no optimiser of this name."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)


class Segment:
    """Consecutive blocks of a model on one party, with their optimiser.

    ``first_block`` is the index of its first block in the whole model: dropout masks are drawn from
    (seed, round, client, step, block), so that they do not depend on where the model is cut.
    """

    def __init__(
        self, blocks: nn.Sequential, first_block: int, run: RunConfig, device: torch.device
    ) -> None:
        self.blocks = blocks.to(device)
        self.device = device
        self._first_block = first_block
        self._run = run
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Begin with a fresh optimiser; blocks without parameters have none."""
        parameters = list(self.blocks.parameters())
        make = OPTIMIZERS[self._run.optimizer]
        self._optimizer = make(parameters, self._run) if parameters else None

    def forward(self, z: Tensor, at: Position) -> Tensor:
        """Return the output for ``z`` in training, keeping the graph for ``backward``.

        Raises:
            RunError: a block cannot train on this batch.
        """
        self.blocks.train()
        z = z.detach().to(self.device)
        self._input = z.requires_grad_() if self._first_block else z
        # A block that works in place may overwrite a copy, never the leaf that gets the gradient.
        out = self._input.clone() if self._first_block else z
        for index, block in enumerate(self.blocks, self._first_block):
            self._seed_block(at, index)
            try:
                out = block(out)
            except (ValueError, RuntimeError) as error:  # BatchNorm on one sample, say
                raise RunError(
                    f"block {index} of the model cannot train on a batch of {len(z)}: {error}"
                ) from error
        self._output = out
        return out

    def _seed_block(self, at: Position, index: int) -> None:
        seed = seeds.derive(self._run.seed, seeds.BLOCK, at.round, at.client, at.step, index)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def backward(self, grad: Tensor) -> Tensor | None:
        """Set the parameters' gradients from that of the last output; return the input's.

        It runs on the output that still has its graph: on a detached copy the parameters would get
        no gradient, and silently stay untrained. None for the model's first segment, whose input
        is data.
        """
        assert self._output is not None, "backward without forward"
        assert self._input is not None
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        if self._output.requires_grad:  # not so for a front without parameters
            torch.autograd.backward(self._output, grad.to(self.device))
        self._output = None
        return self._input.grad

    def update(self) -> None:
        """Take one step of the optimiser with the gradients that ``backward`` left."""
        if self._optimizer is not None:
            self._optimizer.step()

    @torch.no_grad()
    def evaluate(self, z: Tensor) -> Tensor:
        """Return the output for ``z`` with the segment in evaluation mode."""
        self.blocks.eval()
        out: Tensor = self.blocks(z.to(self.device))
        return out

    def state(self) -> dict[str, Tensor]:
        """Return a copy of parameters and buffers, on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.blocks.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers; the optimiser's state is left as it is."""
        self.blocks.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return a copy of the optimiser's tensors, named ``<parameter>.<name>``, on the CPU."""
        if self._optimizer is None:
            return {}
        return {
            f"{index}.{name}": value.detach().cpu().clone()
            for index, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Begin with a fresh optimiser that has these tensors."""
        self.reset_optimizer()
        if self._optimizer is None:
            return
        nested: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            index, _, name = key.partition(".")
            nested.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": nested, "param_groups": groups})

    def optimizer_spec(self) -> dict[str, TensorSpec]:
        """Return the spec of ``optimizer_state()`` after a step, found by taking one on a copy."""
        blocks = copy.deepcopy(self.blocks).cpu()
        trial = Segment(blocks, self._first_block, self._run, torch.device("cpu"))
        for parameter in blocks.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trial.update()
        return state_spec(trial.optimizer_state())


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of one training step: the batch's mean loss, and its hits."""

    loss: float
    correct: int
    samples: int


def train_step(back: Segment, z: Tensor, y: Tensor, at: Position) -> tuple[StepFigures, Tensor]:
    """Compute one step of the back; return its figures and the loss's gradient, like ``z``.

    The back ends in logits (B, classes); cross-entropy, averaged over the batch, applies softmax.
    ``back.update()`` is the caller's, when the gradient is on its way.
    """
    y = y.to(back.device)
    logits = back.forward(z, at)
    leaf = logits.detach().requires_grad_()
    loss = nn.functional.cross_entropy(leaf, y)
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    grads = back.backward(leaf.grad)
    assert grads is not None
    correct = int((logits.argmax(1) == y).sum())
    return StepFigures(loss.item(), correct, len(y)), grads


@dataclass(frozen=True, slots=True)
class Tally:
    """Samples, hits and summed loss of some evaluated batches."""

    samples: int = 0
    correct: int = 0
    loss_sum: float = 0.0

    def figures(self, prefix: str) -> dict[str, float]:
        """Return mean loss and accuracy as ``<prefix>_loss`` and ``<prefix>_acc``, if any."""
        if not self.samples:
            return {}
        loss, accuracy = self.loss_sum / self.samples, self.correct / self.samples
        return {f"{prefix}_loss": loss, f"{prefix}_acc": accuracy}


def add_up(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies; it is the same in any order."""
    tallies = list(tallies)
    return Tally(
        sum(tally.samples for tally in tallies),
        sum(tally.correct for tally in tallies),
        math.fsum(tally.loss_sum for tally in tallies),
    )


def evaluate_step(back: Segment, z: Tensor, y: Tensor) -> Tally:
    """Return the tally of one batch under the back in evaluation mode."""
    y = y.to(back.device)
    logits = back.evaluate(z)
    loss_sum = nn.functional.cross_entropy(logits, y, reduction="sum")
    return Tally(len(y), int((logits.argmax(1) == y).sum()), loss_sum.item())
