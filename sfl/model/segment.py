"""A segment of the model with its optimiser: the arithmetic of a step.

Server, clients, simulation and replay all compute with it. A step calls ``forward`` of each segment
in order, then ``backward`` in reverse. Shapes: ``x`` (B, C, H, W), ``z`` (B, *cut), ``y`` (B,).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfl.errors import SflError, StepFailed, told
from sfl.files.torch_file import TensorSpec, are_finite, state_spec
from sfl.model.block_draws import may_draw, seed_block
from sfl.model.blocks import titled
from sfl.model.metrics import StepFigures, Tally
from sfl.model.segment_optimizer import SegmentOptimizer
from sfl.model.task import Task
from sfl.model.training import Training
from sfl.model.transfer import Fetch, to_device
from sfl.values import Position


@contextlib.contextmanager
def computing(what: str) -> Iterator[None]:
    """Turn exceptions of a model's own code into ``StepFailed``.

    Raises:
        StepFailed: the code raised, except for errors of disk and memory, which pass unchanged.
    """
    try:
        yield
    except (SflError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if "can't allocate memory" in str(error):  # torch's message on a CPU
            raise MemoryError(str(error)) from error
        raise StepFailed(f"{what}: {told(error)}") from error


@dataclass(frozen=True)
class Snapshot:
    """The state of a segment, for ``restore``."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rates: Sequence[float]  # learning rates of the optimiser's groups


class Segment:
    """Consecutive blocks of a model on one party, with their optimiser.

    ``first_block`` is the index of its first block in the whole model, see ``block_draws``.
    Gradients between ``training.cuts`` are clipped separately, even where one segment has several.
    """

    def __init__(
        self, blocks: nn.Sequential, first_block: int, training: Training, device: torch.device
    ) -> None:
        self.blocks = blocks.to(device)
        self.optimizer = SegmentOptimizer(self.blocks, first_block, training)
        self.device = device
        self._first_block = first_block
        self._draws = [may_draw(block) for block in self.blocks]
        # Buffers that a step may change: running statistics, but not masks of -inf.
        self._statistics = {n for n, b in self.blocks.named_buffers() if are_finite([b])}
        self._before: dict[str, Tensor] = {}  # all buffers, before the current step
        self._is_training: bool | None = None  # None: as the blocks were built
        self._kept_in_eval = [module for module in self.blocks.modules() if not module.training]
        self._set_mode(training=True)
        self._training = training
        self.weigh_classes(training.class_weights)
        self._anchor: list[Tensor] = []
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    @property
    def task(self) -> Task:
        return self._training.task

    def weigh_classes(self, weights: Sequence[float]) -> None:
        """Set the class weights of the loss; without weights, it is not weighted."""
        self.class_weights = torch.tensor(weights, device=self.device) if weights else None

    def weighed(self, loss: Tensor) -> Tensor:
        """Return the loss as it stands in the sum of several tasks' losses."""
        weight = self._training.loss_weight
        return loss if weight == 1 else loss * weight

    def start_round(self, round_index: int) -> None:
        """Prepare the optimiser; FedProx pulls towards the current weights."""
        self.optimizer.start_round(round_index)
        if self._training.proximal_mu:
            self._anchor = [p.detach().clone() for p in self.blocks.parameters()]

    def release(self) -> None:
        """Free the memory that only training needs, until ``start_round``."""
        self._input = None
        self._forget_step()
        if not self._training.keeps_optimizer:
            self.optimizer.reset()

    def forward(self, z: Tensor, at: Position) -> Tensor:
        """Return the output for ``z`` in training, keeping the graph for ``backward``.

        Raises:
            StepFailed: a block cannot train on this batch; the message names the block.
        """
        if self._statistics:
            self._before = {name: b.clone() for name, b in self.blocks.named_buffers()}
        self._set_mode(training=True)
        z = to_device(z.detach(), self.device)
        self._input = z.requires_grad_() if self._first_block else z
        # A copy, since an in-place block must not overwrite the leaf that gets the gradient.
        out = self._input.clone() if self._first_block else z
        for index, (block, draws) in enumerate(
            zip(self.blocks, self._draws, strict=True), self._first_block
        ):
            if draws:
                seed_block(self._training.seed, at, index, self.device)
            out = self._run_block(index, block, out, f"train on a batch of {len(z)}")
        self._output = out
        return out

    def _run_block(self, index: int, block: nn.Module, z: Tensor, action: str) -> Tensor:
        """Return a block's output; errors name the block."""
        with computing(f"{titled(index, block)} cannot {action}"):
            out: Tensor = block(z)
        return out

    def _set_mode(self, *, training: bool) -> None:
        """Switch between training and evaluation; modules built in evaluation mode keep it."""
        if self._is_training != training:
            self.blocks.train(training)
            for module in self._kept_in_eval:
                module.training = False
            self._is_training = training

    def backward(self, grad: Tensor) -> Tensor | None:
        """Set the parameters' gradients from the last output's gradient; return the input's.

        It uses the output that has the graph: with a detached copy the parameters would get no
        gradient and silently stay untrained. Return None for the model's first segment.
        """
        assert self._output is not None, "backward without forward"
        return self._backward(self._output, to_device(grad, self.device))

    def backward_of(self, loss: Tensor) -> Tensor | None:
        """Do as ``backward``, from a scalar loss that was computed from the last output."""
        return self._backward(loss, None)

    def _backward(self, tensor: Tensor, grad: Tensor | None) -> Tensor | None:
        assert self._input is not None
        self._forget_step()
        if tensor.requires_grad:  # false for a front without parameters
            with computing(f"the backward pass from block {self._first_block} on fails"):
                torch.autograd.backward(tensor, grad)
        self._add_proximal_gradients()
        return self._input.grad

    def _forget_step(self) -> None:
        """Release the step's graph and the gradients."""
        self._output = None
        for parameter in self.optimizer.parameters:
            parameter.grad = None

    @torch.no_grad()
    def undo_step(self) -> None:
        """Restore the state from before ``forward``; without one since ``update``, do nothing."""
        for name, buffer in self.blocks.named_buffers():
            buffer.copy_(self._before.get(name, buffer))
        self._before = {}
        self._forget_step()

    def gradients_in_place(self) -> Iterator[Tensor]:
        """Yield the gradients of the last ``backward``."""
        return (p.grad for p in self.optimizer.parameters if p.grad is not None)

    def statistics(self) -> Iterator[Tensor]:
        """Yield the buffers that a step may change, such as running statistics."""
        if not self._statistics:
            return iter(())
        return (b for name, b in self.blocks.named_buffers() if name in self._statistics)

    def _add_proximal_gradients(self) -> None:
        """Add the gradient of FedProx's ``mu/2 |w - w_t|^2``: Li et al. 2020, Equation 2."""
        if not self._training.proximal_mu:
            return
        for parameter, anchor in zip(self.blocks.parameters(), self._anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._training.proximal_mu)

    def update(self) -> None:
        """Take one optimiser step with the gradients of the last ``backward``, clipped."""
        with computing(f"the optimiser's step fails from block {self._first_block} on"):
            self.optimizer.step()
        self._before = {}

    def snapshot(self, *, weights: bool = True) -> "Snapshot":
        """Return the state for ``restore``; without ``weights``, of the optimiser alone."""
        own = self.optimizer
        return Snapshot(self.state() if weights else {}, own.state(), own.rates)

    def restore(self, snapshot: "Snapshot") -> None:
        if snapshot.weights:
            self.load(snapshot.weights)
        self.optimizer.load(snapshot.optimizer)
        self.optimizer.set_rates(snapshot.rates)

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen, each under its first name."""
        return {name: p for name, p in self.blocks.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by parameter, on the CPU; zeros for parameters without one."""
        named = self._trained().items()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
        return {name: grad.detach().cpu().clone() for name, grad in grads.items()}

    def set_gradients(self, grads: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained().items():
            parameter.grad = grads[name].to(self.device)

    @torch.no_grad()
    def evaluate(self, z: Tensor) -> Tensor:
        """Return the output for ``z`` with the segment in evaluation mode.

        Raises:
            StepFailed: a block cannot evaluate this batch; the message names the block.
        """
        self._set_mode(training=False)
        out = to_device(z, self.device)
        for index, block in enumerate(self.blocks, self._first_block):
            out = self._run_block(index, block, out, f"evaluate a batch of {len(z)}")
        return out

    def state(self) -> dict[str, Tensor]:
        """Return a copy of parameters and buffers, on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.blocks.state_dict().items()}

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """The spec of ``state()``."""
        return state_spec(self.blocks.state_dict())

    def parameters(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters, on the CPU."""
        named = self._trained().items()
        return {name: parameter.detach().cpu().clone() for name, parameter in named}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters and buffers; keep the optimiser's state."""
        self.blocks.load_state_dict(state)

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained().items():
            parameter.copy_(parameters[name])


class LastStep:
    """A step of the model's last segment, which its device may still compute.

    ``computed``: what is to be checked on the device, the loss and the gradient at the input.
    """

    def __init__(
        self, figures: Callable[[], StepFigures], loss: Tensor, grads: Tensor | None
    ) -> None:
        self._figures, self._grads = figures, Fetch([] if grads is None else [grads])
        self.computed = [loss.detach(), *self._grads.given]

    def results(self) -> tuple[StepFigures, Tensor | None]:
        """Return the figures, and the gradient on the CPU, after one wait."""
        return self._figures(), next(iter(self._grads.wait()), None)


def train_step(
    last: Segment, z: Tensor, y: Tensor, at: Position
) -> tuple[StepFigures, Tensor | None]:
    """Compute one step of the model's last segment; return its figures and the gradient at ``z``.

    The gradient is on the CPU. See ``begin_step``.
    """
    return begin_step(last, z, y, at).results()


def begin_step(last: Segment, z: Tensor, y: Tensor, at: Position) -> LastStep:
    """Begin one step of the model's last segment; what it gives is on its way to the host.

    The task's loss is averaged over the batch; with class weights, divided by the sum of the
    samples' weights. The caller calls ``update()`` after sending the gradient. The gradient has the
    shape of ``z``; it is None if the segment is the whole model.
    """
    y = to_device(y, last.device)
    outputs = last.forward(z, at)
    with computing("the loss cannot be computed"):
        loss = last.task.loss(outputs, y, weight=last.class_weights)
    grads = last.backward_of(last.weighed(loss))
    return LastStep(last.task.begin_figures(outputs, y, loss), loss, grads)


def evaluate_step(last: Segment, z: Tensor, y: Tensor) -> tuple[Tally, Tensor]:
    """Evaluate a batch with the model's last segment; return its tally, and outputs on the CPU."""
    return tally_of(last, last.evaluate(z), y)


def tally_of(last: Segment, outputs: Tensor, y: Tensor) -> tuple[Tally, Tensor]:
    """Return the tally of a batch by its outputs, and these outputs on the CPU."""
    with computing("the figures of an evaluation cannot be computed"):
        return last.task.tally(outputs, to_device(y, last.device)), outputs.cpu()
