"""The table of tasks: what is predicted, the loss, and the metrics.

No other module depends on a loss function, on accuracy or on counts by class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfl.files.torch_file import TensorSpec
from sfl.model import classification
from sfl.model.metrics import StepFigures, Tally
from sfl.model.transfer import Numbers


@dataclass(frozen=True, kw_only=True)
class Table:
    """Additional counts of an evaluation, and the metrics computed from them."""

    name: str  # on the wire
    count: Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> int64; batches add up
    # (a peer's rows, its counts, samples, classes) -> the table; raises ProtocolError
    checked: Callable[[Sequence[object], Sequence[int], int, int], Tensor]
    metrics: Callable[[Tensor], dict[str, float]]
    columns: tuple[str, ...]  # names of the metrics


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Outputs and labels are of a batch: (B, *shape)."""

    loss: Callable[..., Tensor]  # as in torch.nn.functional: (outputs, labels, weight=, reduction=)
    label: TensorSpec  # of one sample
    wrong_labels: Callable[[Tensor, int], str]  # (labels, classes) -> what is wrong; "": nothing
    made_up_labels: Callable[[int, int], Tensor]  # (samples, classes) -> labels, to try a model
    output_shape: Callable[[int], tuple[int, ...]]  # classes -> shape of one sample's output
    output_name: str  # in the file of predictions, and in messages
    # Counts of a batch: name on the wire -> name of the metric, count / samples.
    counted: Mapping[str, str]
    # (outputs, labels) -> these counts, as numbers or tensors of one element each, which are
    # fetched from a GPU together with the loss
    count: Callable[[Tensor, Tensor], tuple[int | Tensor, ...]]
    # (outputs, most) -> for each sample the most likely classes, at most so many: their
    # probabilities (B, most) and indices (B, most); None: what is predicted is no class
    ranked: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    table: Table | None = None
    falls: frozenset[str] = frozenset({"loss"})  # metrics that are better if lower; others higher
    # (outputs, labels) -> int64 counts, by what a sample is and what it is taken for; they add up
    confusion: Callable[[Tensor, Tensor], Tensor] | None = None
    shown: tuple[str, str]  # the metric shown to users beside the loss, and its title

    @property
    def trained(self) -> tuple[str, ...]:
        """The metrics of a training step."""
        return ("loss", *self.counted.values())

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The metrics of an evaluation."""
        return *self.trained, *(self.table.columns if self.table else ())

    @property
    def compared(self) -> dict[str, bool]:
        """The metrics by which rounds are compared, and whether each is better if lower."""
        parts = {"train": self.trained, "val": self.evaluated}
        return {f"{part}_{n}": n in self.falls for part, names in parts.items() for n in names}

    def labels_spec(self, batch: int) -> TensorSpec:
        """Return the spec of a batch's labels."""
        return TensorSpec((batch, *self.label.shape), self.label.dtype)

    def outputs_spec(self, batch: int, num_classes: int) -> TensorSpec:
        """Return the spec of a batch's outputs."""
        return TensorSpec((batch, *self.output_shape(num_classes)), torch.float32)

    def steps_spec(self, num_steps: int) -> TensorSpec:
        """Return the spec of a client's figures of its steps: loss and counts of each."""
        return TensorSpec((num_steps, len(self.trained)), torch.float64)

    def step_figures(self, outputs: Tensor, y: Tensor, loss: Tensor) -> StepFigures:
        """Return the figures of a step with this loss."""
        return self.begin_figures(outputs, y, loss)()

    def begin_figures(self, outputs: Tensor, y: Tensor, loss: Tensor) -> Callable[[], StepFigures]:
        """Begin to fetch the figures of a step; return what waits for them and returns them."""
        fetched, samples = Numbers([loss, *self.count(outputs, y)]), len(y)

        def figures() -> StepFigures:
            mean, *counts = fetched.wait()
            return StepFigures(mean, tuple(map(int, counts)), samples)

        return figures

    def tally(self, outputs: Tensor, y: Tensor) -> Tally:
        """Return the tally of an evaluated batch."""
        loss_sum = self.loss(outputs, y, reduction="sum")
        table = self.table.count(outputs, y).cpu() if self.table else None
        summed, *counts = Numbers([loss_sum, *self.count(outputs, y)]).wait()
        return Tally(len(y), tuple(map(int, counts)), summed, table)

    def named_counts(self, counts: Sequence[int]) -> dict[str, int]:
        """Return counts by their names on the wire; zeros for empty ``counts``."""
        return dict(zip(self.counted, counts or [0] * len(self.counted), strict=True))

    def metrics(self, loss: float, counts: Sequence[float], samples: float) -> dict[str, float]:
        """Return the metrics of a step by its mean loss and counts."""
        return dict(zip(self.trained, (loss, *(n / samples for n in counts)), strict=True))

    def figures(self, tally: Tally, prefix: str) -> dict[str, float]:
        """Return the metrics as ``<prefix>_loss``, ``<prefix>_acc``, ...; {} without samples."""
        if not tally.samples:
            return {}
        metrics = self.metrics(tally.loss_sum / tally.samples, tally.counts, tally.samples)
        if self.table and tally.table is not None:
            metrics |= self.table.metrics(tally.table)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


TASKS: dict[str, Task] = {
    "classification": Task(
        loss=nn.functional.cross_entropy,
        label=TensorSpec((), torch.int64),
        wrong_labels=classification.wrong_labels,
        made_up_labels=classification.made_up_labels,
        output_shape=lambda num_classes: (num_classes,),
        output_name="logits",
        counted={"correct": "acc"},
        count=classification.count_correct,
        ranked=classification.most_likely,
        table=Table(
            name="per_class",
            count=classification.count_by_class,
            checked=classification.checked_classes,
            metrics=classification.class_metrics,
            columns=("balanced_acc", "macro_f1", "weighted_f1"),
        ),
        confusion=classification.count_confusion,
        shown=("acc", "accuracy"),
    ),
}
