"""A part of the model with its optimiser: the arithmetic of a step, written once.

Sockets, simulation and replay all compute through ``Segment``; a step chains ``forward`` along the
segments and ``backward`` against it. Shapes: ``x`` (B, C, H, W), ``z`` (B, *cut), ``y`` (B,).
"""

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sfl import seeds
from sfl.errors import SflError, StepFailed, told
from sfl.files.torch_file import TensorSpec, are_finite, state_spec
from sfl.model.blocks import titled
from sfl.model.metrics import StepFigures, Tally, tally
from sfl.model.training import Training
from sfl.values import Position

# Modules that draw nothing at random. A block of nothing else needs no seed.
_DRAWS_NOTHING = frozenset(
    {
        nn.Sequential, nn.Identity, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm,
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh,
    }
)  # fmt: skip


def _may_draw(module: nn.Module) -> bool:
    """Say whether a module may draw at random; what a user hung onto it may."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or type(module) not in _DRAWS_NOTHING


def _lay_out(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters and their gradients contiguous in memory.

    torch's fused Adam pairs a parameter with its gradient and moments by their order in memory:
    where one of them has another layout, it silently computes with the wrong elements.
    """
    for parameter in parameters:
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        if parameter.grad is not None:
            parameter.grad = parameter.grad.resolve_neg().contiguous()


@contextlib.contextmanager
def computing(what: str) -> Iterator[None]:
    """Make of whatever a model's own code raises the failure of one step.

    Raises:
        StepFailed: it raised; disk and memory, though, are this machine's own trouble.
    """
    try:
        yield
    except (SflError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if "can't allocate memory" in str(error):  # torch's words on a CPU
            raise MemoryError(str(error)) from error
        raise StepFailed(f"{what}: {told(error)}") from error


@dataclass(frozen=True)
class Snapshot:
    """Where a segment was."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rates: Sequence[float]  # the learning rates of its optimiser's groups


class Segment:
    """Consecutive blocks of a model on one party, with their optimiser.

    ``first_block`` is the index of its first block in the whole model: dropout masks are drawn from
    (seed, round, client, step, block), so that they do not depend on where the model is cut.
    Gradients are clipped apart in front of ``training.cut`` and behind it, whether or not the
    segment ends there.
    """

    def __init__(
        self, blocks: nn.Sequential, first_block: int, training: Training, device: torch.device
    ) -> None:
        self.blocks = blocks.to(device)
        for parameter in self.blocks.parameters():
            # Dimensions of size 1 as well: torch looks there.
            parameter.data = parameter.data.reshape(-1).view(parameter.shape)
        self.device = device
        self._first_block = first_block
        self._draws = [any(map(_may_draw, block.modules())) for block in self.blocks]
        # Buffers that a step may spoil: running statistics, and no mask of -inf.
        self._statistics = {n for n, b in self.blocks.named_buffers() if are_finite([b])}
        self._before: dict[str, Tensor] = {}  # all buffers, before the step that is under way
        self._is_training: bool | None = None  # as its blocks came
        self._kept_in_eval = [module for module in self.blocks.modules() if not module.training]
        self._set_mode(training=True)
        self._training = training
        self.weigh_classes(training.class_weights)
        self._anchor: list[Tensor] = []
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._reset_optimizer()

    def weigh_classes(self, weights: Sequence[float]) -> None:
        """Let the loss weigh samples by their class; without weights, alike."""
        self.class_weights = torch.tensor(weights, device=self.device) if weights else None

    def start_round(self, round_index: int) -> None:
        """Take the round's learning rate; and a fresh optimiser, unless they keep their state.

        The weights of now are those that FedProx pulls towards.
        """
        if not self._training.keeps_optimizer:
            self._reset_optimizer()
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._training.learning_rate(round_index)
        if self._training.proximal_mu:
            self._anchor = [p.detach().clone() for p in self.blocks.parameters()]

    def _reset_optimizer(self) -> None:
        """Begin with a fresh optimiser; blocks without parameters have none."""
        self._parameters = list(self.blocks.parameters())
        make = self._training.make_optimizer
        self._optimizer = make(self._parameters) if self._parameters else None

    def rest(self) -> None:
        """Give up what only training needs, until ``start_round``."""
        self._input = None
        self._forget_step()
        if not self._training.keeps_optimizer:
            self._reset_optimizer()

    def forward(self, z: Tensor, at: Position) -> Tensor:
        """Return the output for ``z`` in training, keeping the graph for ``backward``.

        Raises:
            StepFailed: a block cannot train on this batch; the message names the block.
        """
        if self._statistics:
            self._before = {name: b.clone() for name, b in self.blocks.named_buffers()}
        self._set_mode(training=True)
        z = z.detach().to(self.device)
        self._input = z.requires_grad_() if self._first_block else z
        # A block that works in place may overwrite a copy, never the leaf that gets the gradient.
        out = self._input.clone() if self._first_block else z
        for index, (block, draws) in enumerate(
            zip(self.blocks, self._draws, strict=True), self._first_block
        ):
            if draws:
                self._seed_block(at, index)
            out = self._run_block(index, block, out, f"train on a batch of {len(z)}")
        self._output = out
        return out

    def _run_block(self, index: int, block: nn.Module, z: Tensor, task: str) -> Tensor:
        """Return what a block makes of ``z``; what its code raises names the block."""
        with computing(f"{titled(index, block)} cannot {task}"):
            out: Tensor = block(z)
        return out

    def _set_mode(self, *, training: bool) -> None:
        """Train or evaluate; modules that came in ``eval()`` stay in it."""
        if self._is_training != training:
            self.blocks.train(training)
            for module in self._kept_in_eval:
                module.training = False
            self._is_training = training

    def _seed_block(self, at: Position, index: int) -> None:
        seed = seeds.derive(self._training.seed, seeds.BLOCK, at.round, at.client, at.step, index)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)  # a user's own block may draw from any of them
        np.random.seed(seed % 2**32)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def backward(self, grad: Tensor) -> Tensor | None:
        """Set the parameters' gradients from that of the last output; return the input's.

        It runs on the output that still has its graph: on a detached copy the parameters would get
        no gradient, and silently stay untrained. None for the model's first segment, whose input
        is data.
        """
        assert self._output is not None, "backward without forward"
        return self._backward(self._output, grad.to(self.device))

    def backward_of(self, loss: Tensor) -> Tensor | None:
        """Do as ``backward``, from a loss () that was computed from the last output."""
        return self._backward(loss, None)

    def _backward(self, tensor: Tensor, grad: Tensor | None) -> Tensor | None:
        assert self._input is not None
        self._forget_step()
        if tensor.requires_grad:  # not so for a front without parameters
            with computing(f"the backward pass from block {self._first_block} on fails"):
                torch.autograd.backward(tensor, grad)
        self._add_proximal_gradients()
        return self._input.grad

    def _forget_step(self) -> None:
        """Let go of a step's graph, and of the gradients of the step before."""
        self._output = None
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def undo_step(self) -> None:
        """Go back to before ``forward``; in time until ``update``."""
        for name, buffer in self.blocks.named_buffers():
            buffer.copy_(self._before.get(name, buffer))
        self._forget_step()

    def gradients_in_place(self) -> Iterator[Tensor]:
        """Yield the gradients that ``backward`` left."""
        return (p.grad for p in self._parameters if p.grad is not None)

    def statistics(self) -> Iterator[Tensor]:
        """Yield the buffers that a step changes, running statistics for one."""
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
        """Take one step of the optimiser with the gradients that ``backward`` left, clipped."""
        if self._optimizer is None:
            return
        if self._training.clip_norm:
            for half in self._halves():
                nn.utils.clip_grad_norm_(half, self._training.clip_norm)
        with computing(f"the optimiser's step fails from block {self._first_block} on"):
            _lay_out(self._parameters)
            self._optimizer.step()

    def _halves(self) -> Iterator[list[nn.Parameter]]:
        """Yield the parameters in front of the run's cut, and those behind it, if any.

        One that lies on both sides, where a scheme has no cut, counts in front.
        """
        inner = min(max(self._training.cut - self._first_block, 0), len(self.blocks))
        seen: set[nn.Parameter] = set()
        for part in (self.blocks[:inner], self.blocks[inner:]):
            if parameters := [p for p in part.parameters() if p not in seen]:
                seen.update(parameters)
                yield parameters

    def snapshot(self, *, weights: bool = True) -> "Snapshot":
        """Return what ``restore`` goes back to; without ``weights`` the optimiser alone."""
        rates = [group["lr"] for group in self._optimizer.param_groups] if self._optimizer else []
        return Snapshot(self.state() if weights else {}, self.optimizer_state(), rates)

    def restore(self, snapshot: "Snapshot") -> None:
        """Go back to where this segment was."""
        if snapshot.weights:
            self.load(snapshot.weights)
        self.load_optimizer_state(snapshot.optimizer)
        groups = self._optimizer.param_groups if self._optimizer else []
        for group, rate in zip(groups, snapshot.rates, strict=True):
            group["lr"] = rate

    def _trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen; one of several names by its first."""
        return {name: p for name, p in self.blocks.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that ``backward`` left, by parameter, on the CPU; 0 where none."""
        named = self._trained().items()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
        return {name: grad.detach().cpu().clone() for name, grad in grads.items()}

    def set_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Take these gradients instead of any that ``backward`` left."""
        for name, parameter in self._trained().items():
            parameter.grad = grads[name].to(self.device)

    @torch.no_grad()
    def evaluate(self, z: Tensor) -> Tensor:
        """Return the output for ``z`` with the segment in evaluation mode.

        Raises:
            StepFailed: a block cannot take this batch.
        """
        self._set_mode(training=False)
        out = z.to(self.device)
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
        """Return a copy of the parameters that are trained, on the CPU."""
        named = self._trained().items()
        return {name: parameter.detach().cpu().clone() for name, parameter in named}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers; the optimiser's state is left as it is."""
        self.blocks.load_state_dict(state)

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Take over the parameters that are trained."""
        for name, parameter in self._trained().items():
            parameter.copy_(parameters[name])

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
        self._reset_optimizer()
        if self._optimizer is None:
            return
        nested: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            index, _, name = key.partition(".")
            nested.setdefault(int(index), {})[name] = value.contiguous()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": nested, "param_groups": groups})

    def optimizer_spec(self) -> dict[str, TensorSpec]:
        """Return the spec of ``optimizer_state()`` after a step, found by taking one on a copy."""
        blocks = copy.deepcopy(self.blocks).cpu()
        trial = Segment(blocks, self._first_block, self._training, torch.device("cpu"))
        for parameter in blocks.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trial.update()
        return state_spec(trial.optimizer_state())


def train_step(
    last: Segment, z: Tensor, y: Tensor, at: Position
) -> tuple[StepFigures, Tensor | None]:
    """Compute one step of the model's last segment; return its figures and the gradient at ``z``.

    It ends in logits (B, classes); cross-entropy, averaged over the batch, applies softmax. With
    weights of classes the average is weighted: divided by the sum of the samples' weights.
    ``update()`` is the caller's, when the gradient, like ``z``, is on its way. A segment that is
    the whole model has no such gradient.
    """
    y = y.to(last.device)
    logits = last.forward(z, at)
    with computing("the loss cannot be computed"):
        loss = nn.functional.cross_entropy(logits, y, last.class_weights)
    grads = last.backward_of(loss)
    correct = int((logits.argmax(1) == y).sum())
    return StepFigures(loss.item(), correct, len(y)), grads


def evaluate_step(last: Segment, z: Tensor, y: Tensor) -> tuple[Tally, Tensor]:
    """Return the tally of one batch under the model's last segment in evaluation mode, and the
    logits: (B, classes) float32, on the CPU.
    """
    logits = last.evaluate(z)
    with computing("the figures of an evaluation cannot be computed"):
        return tally(logits, y.to(last.device)), logits.cpu()
