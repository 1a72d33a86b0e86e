"""What an attacker sees: a network that makes images of a front's activations again.

Inversion by a learned decoder: He, Zhang, Lee 2019, "Model inversion attacks against collaborative
inference", ACSAC, section 4.2 (their inverse network); the attacker sees what is sent, and can
compute activations of images of its own. Here these shadow images are test samples of the run's
data set, on which no client has trained; a part of them is held out, to measure how alike image and
reconstruction are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.web.similarity import ssim
from sfl import __version__
from sfl.data.client_data import Source
from sfl.data.samples import as_floats
from sfl.errors import ConfigError, DataError
from sfl.interactive.run import Run
from sfl.model.portable import About
from sfl.nodes import NodeConfig
from sfl.trained.export import back_checksum
from sfl.trained.kinds import KINDS, NUM_SAMPLES, check_onnx_installed

STEPS, BATCH, RATE = 800, 64, 4e-3  # 37 s of one processor for 28x28 images
_FEWEST_STEPS, _LARGEST = 100, 4 * 28 * 28  # of larger images, fewer steps
_MOST_SHADOW, _MOST_BYTES = 2000, 2**26  # images, as floats
_HELD_OUT = 5  # one in five
_CHANNELS, _FEWEST_CHANNELS, _GRID, _RANK = 32, 12, 8, 256
_FEW = 10  # fewer shadow images than this tell nothing


@dataclass(frozen=True)
class Made:
    """A decoder, and how well it does on images that it was not trained on."""

    data: bytes  # ONNX: activations (B, *features) to images (B, channels, height, width) in [0, 1]
    similarity: float  # mean SSIM of held-out images and their reconstructions
    baseline: float  # the same of held-out images and the mean of the others: knowing nothing
    num_shadow: int
    num_held_out: int


class ImageDecoder(nn.Module):
    """Activations (B, *features) to images (B, channels, height, width) in [0, 1].

    Maps are convolved, a vector first becomes maps of at most 8x8; then maps are doubled and
    convolved, with half the channels each time, until they cover the image.
    """

    def __init__(self, features: Tensor, image: tuple[int, ...]) -> None:
        """``features`` (N, *features): examples; each value's mean and spread are taken of them."""
        super().__init__()
        channels, self.height, self.width = image
        spread = features.std(0) + 1e-2 * features.std() + 1e-6  # of values that are always 0
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", spread)
        if features.dim() == 4:
            sides = tuple(features.shape[2:])
            first: nn.Module = nn.Conv2d(features.shape[1], _CHANNELS, 3, padding=1)
        else:
            doublings = _doublings((_GRID, _GRID), image[1:])
            sides = tuple(math.ceil(side / 2**doublings) for side in image[1:])
            first = _linear(features[0].numel(), _CHANNELS * sides[0] * sides[1])
            first = nn.Sequential(nn.Flatten(), first, nn.Unflatten(1, (_CHANNELS, *sides)))
        layers = [first, nn.ReLU()]
        before = _CHANNELS
        for _ in range(_doublings(sides, image[1:])):
            after = max(_FEWEST_CHANNELS, before // 2)
            layers += [nn.Upsample(scale_factor=2)]
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers((z - self.mean) / self.spread)
        return torch.sigmoid(images)[..., : self.height, : self.width]


def _doublings(sides: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    """Return how often sides must be doubled until each is at least the wanted one."""
    return max(0, *(math.ceil(math.log2(b / a)) for a, b in zip(sides, wanted, strict=True)))


def _linear(inputs: int, outputs: int) -> nn.Module:
    """Return a linear layer; one that would be huge gets a waist."""
    if inputs * outputs <= 2**22:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, _RANK), nn.ReLU(), nn.Linear(_RANK, outputs))


def shadow_images(run: Run, node: NodeConfig) -> Tensor:
    """Return test images of the run's data set, (N, channels, height, width) in [0, 1].

    Raises:
        ConfigError: its samples are no images.
        DataError: the data set is not on this machine, or is the clients' own.
    """
    shape, spec = run.normalisation.input_shape, run.data_spec
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"samples of shape {list(shape)} are no images to be made again")
    if run.config.partition == "own":
        raise DataError(
            "the clients trained on data of their own, and the decoder needs images like theirs"
        )
    test = spec.load(Source(node.data_path, node.cache_path, shape))[1].sized(shape)
    most = min(_MOST_SHADOW, _MOST_BYTES // (4 * math.prod(shape)))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(run.config.seed))
    images = as_floats(test.take(order[:most]).x)
    if len(images) < _FEW or not (images.min() >= 0 and images.max() <= 1):
        raise DataError(f"{len(images)} test samples: needed are {_FEW}, with values in [0, 1]")
    return images


def make_decoder(
    run: Run,
    images: Tensor,
    *,
    client: int | None = None,
    steps: int = STEPS,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Made:
    """Train a decoder for a run's front, and return it as an ONNX file.

    ``images``: as of ``shadow_images``; one in five is held out. ``client``: whose front, where
    each keeps its own. ``on_progress`` is told the steps that are done, and of how many.

    Raises:
        ConfigError: a package is missing.
        RunError: the front does not lie on this machine, or the decoder cannot be exported.
    """
    check_onnx_installed()
    num_held_out = max(1, len(images) // _HELD_OUT)
    held_out, shadow = images[:num_held_out], images[num_held_out:]
    observe = observer(run, client)
    steps = min(steps, max(_FEWEST_STEPS, steps * _LARGEST // images[0].numel()))
    decoder = train(observe, shadow, steps, on_progress, seed=run.config.seed)
    with torch.no_grad():
        seen = observe(held_out)
        found = ssim(torch.cat([decoder(part) for part in seen.split(BATCH)]), held_out).mean()
    baseline = ssim(shadow.mean(0, keepdim=True).expand_as(held_out), held_out).mean()
    examples = seen[torch.arange(NUM_SAMPLES) % len(seen)]
    data = KINDS["onnx"].make(decoder, examples, _about(run, tuple(seen.shape[1:]))).data
    return Made(data, float(found), float(baseline), len(shadow), num_held_out)


def train(
    observe: Callable[[Tensor], Tensor],
    shadow: Tensor,
    steps: int,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    *,
    seed: int = 0,
) -> ImageDecoder:
    """Return a decoder of what ``observe`` makes of images (B, *image), by least squares.

    In every other step the images are turned, shifted and resized a little: a drawing's place and
    size are not those of the data set. The result depends on the arguments alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = ImageDecoder(observe(shadow), tuple(shadow.shape[1:]))
        optimizer = torch.optim.Adam(decoder.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        for step in range(steps):
            images = shadow[torch.randint(len(shadow), (BATCH,))]
            if step % 2:
                images = moved(images)
            loss = functional.mse_loss(decoder(observe(images)), images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_progress(step + 1, steps)
    return decoder.eval()


def moved(images: Tensor) -> Tensor:
    """Turn by up to 15 degrees, resize by up to a fifth, shift by up to 15 % of half the side."""
    angle, size, across, down = (torch.rand(4, len(images)) * 2 - 1) * torch.tensor(
        [[0.25], [0.2], [0.15], [0.15]]
    )
    cos, sin = (1 + size) * angle.cos(), (1 + size) * angle.sin()
    rows = torch.stack([torch.stack([cos, -sin, across]), torch.stack([sin, cos, down])])
    grid = functional.affine_grid(rows.permute(2, 0, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def observer(run: Run, client: int | None) -> Callable[[Tensor], Tensor]:
    """Return what computes the activations that a client sends for images in [0, 1]."""
    front, known = run.front(client=client), run.normalisation
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (known.mean, known.std))

    @torch.no_grad()
    def observe(images: Tensor) -> Tensor:
        parts = [front(part) for part in ((images - mean) / std).split(BATCH)]
        return torch.cat(parts)

    return observe


def _about(run: Run, takes: tuple[int, ...]) -> About:
    known, config = run.normalisation, run.config
    return About(
        part="decoder",
        model=config.model,
        cuts=run.split.cuts,
        task=config.task,
        input_shape=known.input_shape,
        takes=takes,
        mean=known.mean,
        std=known.std,
        classes=known.classes,
        run=config.run,
        seed=config.seed,
        round=run.last_round(),
        back_checksum=back_checksum(run),
        sfl_version=__version__,
    )
