"""Trial passes of a model's segments on a few made-up samples, on copies.

A pass goes through all segments as in a run; each computes on the previous one's output, in the
memory layout of a received tensor. It changes neither the model nor any random generator.
"""

import contextlib
import itertools
import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sfl.errors import ConfigError, StepFailed, told
from sfl.files.checksum import crc32
from sfl.files.torch_file import DTYPES, TensorSpec, state_spec
from sfl.model.blocks import check_no_shared_weights, copied, titled
from sfl.model.segment import Segment
from sfl.model.training import Training
from sfl.values import Position

CPU = torch.device("cpu")
_TOGETHER = "put what belongs together (a residual, with all that it goes around) into one block"


class BlockOutput(NamedTuple):
    """A block's output in a pass."""

    title: str  # of the block
    checksum: int


@contextlib.contextmanager
def _own_random_state(devices: Collection[torch.device]) -> Iterator[None]:
    """Seed all generators alike for each pass, and restore them afterwards."""
    states = random.getstate(), np.random.get_state()
    gpus = {device.index or 0 for device in devices if device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(gpus)):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _batch(input_shape: Sequence[int], size: int) -> Tensor:
    return torch.randn(size, *input_shape, generator=torch.Generator().manual_seed(size))


def _as_received(z: Tensor) -> Tensor:
    """Return a copy in the memory layout of a received tensor."""
    return z.contiguous().clone()


class _Watched(Segment):
    """A segment that records its blocks' outputs."""

    def __init__(self, *arguments: Any, cuts: Collection[int]) -> None:
        """``cuts``: blocks whose input gets the memory layout of a received tensor."""
        super().__init__(*arguments)
        self._cuts = cuts
        self.start_pass([])

    def start_pass(self, outputs: list[BlockOutput]) -> None:
        """Append the blocks' outputs to ``outputs`` from now on."""
        self._block_outputs = outputs
        self._nodes: set[Any] = set()  # visited nodes of the autograd graph

    @property
    def titles(self) -> list[str]:
        """The titles of the blocks."""
        return [titled(index, block) for index, block in enumerate(self.blocks, self._first_block)]

    def _run_block(self, index: int, block: nn.Module, z: Tensor, action: str) -> Tensor:
        title = titled(index, block)
        if index in self._cuts and isinstance(z, Tensor) and z.layout is torch.strided:
            z = _as_received(z)
        try:
            out = super()._run_block(index, block, z, action)
        except OSError as error:  # a user's own block may read files
            raise StepFailed(f"{title} cannot {action}: {told(error)}") from error
        self._block_outputs.append(BlockOutput(title, _checksum(out)))
        if isinstance(out, Tensor):
            self._check_parameters(title, out)
        return out

    def _check_parameters(self, title: str, out: Tensor) -> None:
        """Check that a block's output depends on no parameters of other segments.

        Raises:
            ConfigError: it does; a copy of the block would compute with untrained weights.
        """
        own, todo = set(map(id, self.optimizer.parameters)), [out.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in self._nodes:
                continue
            self._nodes.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
                raise ConfigError(
                    f"{title} computes with a parameter {list(leaf.shape)} that is not among those"
                    " of its side of the model: it belongs to a block on the other side of the cut,"
                    " or is kept in a list or function; make it an attribute of a block"
                )
            todo += [following for following, _ in node.next_functions]


def _checksum(output: object) -> int:
    """Return a checksum of a block's output, which may be several tensors."""
    if isinstance(output, Tensor) and output.layout is torch.strided:
        flat = output.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return crc32(flat.view(torch.uint8).cpu().numpy()) if output.numel() else 0
    if isinstance(output, (dict, list, tuple)):
        parts = output.values() if isinstance(output, dict) else output
        return hash(tuple(_checksum(part) for part in parts))
    return 0


class Trial:
    """Copies of a model's segments, for passes of a few samples.

    ``cuts``: for a model in one piece, the blocks at which it is otherwise cut, so that it computes
    the same bits. ``samples``: expected spec of one sample at each cut. ``devices``: of each
    segment; the CPU if not given.

    Raises (from each method):
        ConfigError: the model cannot be run like this; the message names the block.
    """

    def __init__(
        self,
        rows: Sequence[nn.Sequential],
        training: Training,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        cuts: Collection[int] = (),
        samples: Sequence[TensorSpec] = (),
        devices: Sequence[torch.device] = (),
    ) -> None:
        self._devices = devices or [CPU] * len(rows)
        self._rows, self._input_shape, self._num_classes = rows, input_shape, num_classes
        self._task, self._samples = training.task, samples
        self._segments = []
        firsts = itertools.accumulate(map(len, rows), initial=0)
        for first, row, device in zip(firsts, rows, self._devices, strict=False):
            segment = _Watched(copied(row, first), first, training, device, cuts=cuts)
            self._segments.append(segment)

    def evaluate(self, size: int) -> tuple[list[Tensor], list[BlockOutput]]:
        """Evaluate a batch of made-up samples; return the outputs of segments and of blocks."""
        with self._passing() as outputs:
            z, outs = _batch(self._input_shape, size), []
            for index, segment in enumerate(self._segments):
                z = self._checked(segment.evaluate(z), index, size, "in evaluation")
                outs.append(z)
        return outs, outputs

    def train(self, size: int, *, backward: bool = False) -> list[BlockOutput]:
        """Train on a batch of made-up samples, with a ``backward`` pass or not; return outputs."""
        with self._passing() as outputs:
            z, inputs = _batch(self._input_shape, size), []
            for index, segment in enumerate(self._segments):
                inputs.append(z)
                out = segment.forward(z, Position())
                z = self._checked(out.detach() if isinstance(out, Tensor) else out, index, size)
            if backward:
                self._go_backward(out, inputs)
        return outputs

    @contextlib.contextmanager
    def _passing(self) -> Iterator[list[BlockOutput]]:
        """Start a pass with the initial weights; raise ConfigError if a block fails in it."""
        outputs: list[BlockOutput] = []
        for row, segment in zip(self._rows, self._segments, strict=True):
            self._check_state(row, segment)
            segment.load(row.state_dict())
            segment.start_pass(outputs)
        try:
            with _own_random_state(self._devices):
                yield outputs
        except StepFailed as error:
            raise ConfigError(str(error)) from error

    def _check_state(self, row: nn.Sequential, segment: Segment) -> None:
        expected, found = state_spec(row.state_dict()), segment.spec
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise ConfigError(
                    f"block {name.split('.')[0]!r} of the model changes the shape of {name!r} while"
                    " it is used: what is trained and averaged has one shape"
                )

    def _checked(self, out: object, index: int, size: int, when: str = "in training") -> Tensor:
        """Return a segment's output as received by the next, after checking it."""
        title = (self._segments[index].titles or ["a model without blocks"])[-1]
        is_last = index == len(self._segments) - 1
        title += "" if is_last else " in front of the cut"
        z = _check_given(out, size, title)
        wanted = self._task.output_shape(self._num_classes)
        if is_last and z.shape[1:] != wanted:
            shown = "x".join(map(str, wanted))
            raise ConfigError(
                f"the model's output is {list(z.shape)} for {size} samples; wanted are"
                f" {shown} {self._task.output_name} for each"
            )
        sample = TensorSpec(tuple(z.shape[1:]), z.dtype)
        if index < len(self._samples) and sample != self._samples[index]:
            raise ConfigError(
                f"{title} gives {_shown(sample)} for each of {size} samples {when},"
                f" but {_shown(self._samples[index])} for one alone in evaluation"
            )
        return _as_received(z)

    def _go_backward(self, outputs: Tensor, inputs: Sequence[Tensor]) -> None:
        """Go back from the loss through all segments, with what each has been given."""
        weights = self._segments[-1].class_weights
        y = self._task.made_up_labels(len(outputs), self._num_classes).to(outputs.device)
        grad: Tensor | None = self._task.loss(outputs, y, weight=weights)
        learns = any(p.requires_grad for row in self._rows for p in row.parameters())
        for index in reversed(range(len(self._segments))):
            segment = self._segments[index]
            is_last = index == len(self._segments) - 1
            is_cut_off = is_last and learns and not outputs.requires_grad
            try:
                assert grad is not None
                grad = segment.backward_of(grad) if is_last else segment.backward(grad)
            except Exception as error:  # a user's own
                where = _backward_fault(segment, inputs[index], needs_gradient=False)
                raise ConfigError(
                    f"the gradients of {where} fail: {told(error.__cause__ or error)}"
                ) from error
            for name, parameter in segment.blocks.named_parameters():
                if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                    raise ConfigError(
                        f"block {name.split('.')[0]!r} of the model gives {name!r} a sparse"
                        " gradient, which cannot be averaged or sent: leave out sparse=True"
                    )
            if is_cut_off or (index and grad is None):
                where = _backward_fault(segment, inputs[index], needs_gradient=True)
                raise ConfigError(
                    f"{where} gives no gradient back, so that nothing in front of it would learn:"
                    " it must not detach what it is given"
                )


def _shown(spec: TensorSpec) -> str:
    return f"{list(spec.shape)} {spec.dtype}".replace("torch.", "")


def _check_given(out: object, size: int, title: str) -> Tensor:
    """Return a segment's output, after checking that it is one tensor that can be sent."""
    if not isinstance(out, Tensor):
        count = f" of {len(out)}" if isinstance(out, (tuple, list, dict)) else ""
        raise ConfigError(
            f"{title} gives a {type(out).__name__}{count}, where one tensor is wanted: {_TOGETHER}"
        )
    dtype = str(out.dtype).removeprefix("torch.")
    if out.layout is not torch.strided or out.is_nested:
        raise ConfigError(f"{title} gives no dense tensor, which cannot travel: add .to_dense()")
    if not out.is_floating_point() or out.dtype not in DTYPES:
        raise ConfigError(
            f"{title} gives {dtype}: what passes from block to block here has gradients and"
            " travels, as float32 or another real floating-point dtype"
        )
    if not out.dim() or out.shape[0] != size:
        raise ConfigError(
            f"{title} gives {list(out.shape)} for a batch of {size}: the first dimension has to be"
            " the batch (in torch's recurrent layers and attention: batch_first=True)"
        )
    return out


def _backward_fault(segment: _Watched, z: Tensor, *, needs_gradient: bool) -> str:
    """Return the title of the first block that passes no gradient; else of the whole row."""
    z = z.to(segment.device)
    for title, block in zip(segment.titles, segment.blocks, strict=True):
        try:
            given = z.detach().requires_grad_()
            z = block(given.clone())
            grads = torch.autograd.grad(z.sum(), given, allow_unused=True)
            fails = needs_gradient and grads[0] is None
        except Exception:  # noqa: BLE001 - this is the block that is searched for
            fails = True
        if fails:
            return title
    return f"the row from {segment.titles[0]} to {segment.titles[-1]}"


def sample_specs(
    rows: Sequence[nn.Sequential],
    training: Training,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> list[TensorSpec]:
    """Return the spec of one sample at each cut, by evaluating one made-up sample.

    Raises:
        ConfigError: a segment fails; the message names the block.
    """
    try:
        outs, _ = Trial(rows, training, input_shape, num_classes).evaluate(1)
    except ConfigError as error:
        shown = f"the model does not take samples of shape {list(input_shape)}: "
        why = shown if isinstance(error.__cause__, StepFailed) else ""
        hint = where_to_cut(rows, training, input_shape, num_classes)
        raise ConfigError(f"{why}{error}{hint}") from error
    return [TensorSpec(tuple(z.shape[1:]), z.dtype) for z in outs[:-1]]


def where_to_cut(
    rows: Sequence[nn.Sequential],
    training: Training,
    input_shape: tuple[int, ...],
    num_classes: int,
) -> str:
    """Return the end of an error message: at which other cuts the model works; "" if at none."""
    if len(rows) == 1:
        return ""
    blocks = [item for row in rows for item in row._modules.items() if item[1] is not None]
    whole, fit = nn.Sequential(OrderedDict(blocks)), []
    for cut in range(1, len(blocks)):
        halves = [nn.Sequential(OrderedDict(part)) for part in (blocks[:cut], blocks[cut:])]
        try:
            check_no_shared_weights(halves)
            uncut = Trial([whole], training, input_shape, num_classes, cuts=[cut])
            _, expected = uncut.evaluate(1)
            _, found = Trial(halves, training, input_shape, num_classes).evaluate(1)
        except ConfigError:
            continue
        fit += [str(cut)] if found == expected else []
    return f"; this model can be cut at --cut {' or '.join(fit)}" if fit else ""
