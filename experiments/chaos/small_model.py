"""A small model with every kind of state: BatchNorm and dropout on both sides of its cut."""

from collections import OrderedDict

from torch import nn

NAME = "experiments.chaos.small_model:bn_dropout"
CUT = 6


def bn_dropout(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """A CNN with BatchNorm, dropout and in-place modules on both sides of every cut."""
    channels, height, width = input_shape
    features = 4 * ((height - 3) // 4) * ((width - 3) // 4)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, 4, 5, stride=2),
            norm1=nn.BatchNorm2d(4),
            relu1=nn.ReLU(inplace=True),
            drop1=nn.Dropout2d(0.2),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            norm2=nn.BatchNorm1d(features),
            fc1=nn.Linear(features, 32),
            relu2=nn.ReLU(inplace=True),
            drop2=nn.Dropout(0.3),
            norm3=nn.BatchNorm1d(32),
            fc2=nn.Linear(32, num_classes),
        )
    )
