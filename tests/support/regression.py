"""A task and a model of a user's own: the digit as a number."""

import torch
from torch import Tensor, nn

from sfl.files.torch_file import TensorSpec
from sfl.model.task import Task


def squared_error(
    outputs: Tensor, y: Tensor, weight: object = None, reduction: str = "mean"
) -> Tensor:
    return nn.functional.mse_loss(outputs.flatten(), y.float(), reduction=reduction)


def near(outputs: Tensor, y: Tensor) -> tuple[int, int]:
    """Count the samples that are less than one off, and those that are less than two."""
    off = (outputs.flatten() - y).abs()
    return int((off < 1).sum()), int((off < 2).sum())


# The digit as a number, with two counts and no table.
REGRESSION = Task(
    loss=squared_error,
    label=TensorSpec((), torch.int64),
    wrong_labels=lambda y, num_classes: "",
    made_up_labels=lambda num_samples, num_classes: torch.zeros(num_samples),
    output_shape=lambda num_classes: (1,),
    output_name="guesses",
    counted={"near": "share_near", "around": "share_around"},
    count=near,
    shown=("share_near", "share of near guesses"),
)


def one_number(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 1))
