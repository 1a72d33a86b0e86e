"""torchvision's networks as rows of named blocks that can be cut at every index.

Weights are initialised as in torchvision; those that it has for download are for ``--init``. The
first convolution has as many input channels as the data; all else is as in torchvision.
"""

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sfl.errors import RunError, reason_of


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a network's single layers and residual blocks, in the order of its forward pass."""
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}_{index}", block) for index, block in child.named_children())
        else:
            yield name, child


def _take_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a convolution like this one for another number of channels."""
    if convolution.in_channels == channels:
        return convolution
    return nn.Conv2d(
        channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
    )


def vision_model(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a network of torchvision's as a row of blocks, flattened before its classifier."""
    from torchvision import models  # takes seconds to import

    row = _row(getattr(models, name)(weights=None, num_classes=num_classes))
    blocks = row._modules
    first = next(iter(blocks))
    convolution = blocks[first]
    assert isinstance(convolution, nn.Conv2d)
    blocks[first] = _take_channels(convolution, input_shape[0])
    return row


def pretrained_state(name: str) -> dict[str, Tensor]:
    """Return torchvision's weights for ImageNet of a network as those of a row of blocks.

    They are torchvision's newest, downloaded into torch's cache, if they are not there.

    Raises:
        RunError: they cannot be downloaded or read.
    """
    from torchvision import models

    network, weights = getattr(models, name)(weights=None), models.get_model_weights(name).DEFAULT
    try:
        with contextlib.redirect_stderr(sys.stdout):  # torch says what it downloads
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # of network, disk, or a damaged file, as torch raises it
        raise RunError(
            f"--init pretrained: cannot load {weights.url}: {reason_of(error)}; where there is no"
            f" internet, bring that file to {torch.hub.get_dir()}/checkpoints"
        ) from error
    return dict(_row(network).state_dict())


def _row(network: nn.Module) -> nn.Sequential:
    """Return a network's layers and residual blocks as a row, flattened before its classifier."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for block_name, block in _blocks(network):
        if block_name in ("classifier_0", "fc"):
            blocks["flatten"] = nn.Flatten()
        blocks[block_name] = block
    return nn.Sequential(blocks)
