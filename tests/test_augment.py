"""Augmentation: what it does to images, and that its draws depend on what they should."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfl.config import RunConfig
from sfl.data.augment import augment, changes_of
from sfl.data.client_data import part_of
from sfl.data.datasets import DATASETS
from sfl.data.samples import Samples
from sfl.errors import ConfigError
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from sfl.values import Position
from tests.support.launch import Launcher
from tests.support.made_data import loaded
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

X = torch.rand(64, 3, 12, 16, generator=torch.Generator().manual_seed(1))
AT = Position("r", round=2, step=5, client=1)
ALL = "hflip+vflip+crop:padding=2+rotate:degrees=20"


def changed(text: str, x: Tensor = X, *, seed: int = 0, at: Position = AT) -> Tensor:
    return augment(x, changes_of(text), 0.5, seed=seed, at=at)


@pytest.mark.parametrize(("text", "dimension"), [("hflip", 3), ("vflip", 2)])
def test_about_half_of_the_images_are_mirrored_the_rest_left(text: str, dimension: int) -> None:
    out = changed(text)
    mirrored = [torch.equal(a, b) for a, b in zip(out, X.flip(dimension), strict=True)]
    same = [torch.equal(a, b) for a, b in zip(out, X, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_crop_shifts_and_fills_with_the_background() -> None:
    out = changed("crop:padding=2")
    padded = torch.nn.functional.pad(X, [2] * 4, value=0.5)
    shifts = []
    for image, source in zip(out, padded, strict=True):
        found = [
            (dy, dx)
            for dy, dx in itertools.product(range(5), range(5))
            if torch.equal(image, source[:, dy : dy + 12, dx : dx + 16])
        ]
        assert len(found) == 1
        shifts += found
    assert len(set(shifts)) > 15
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == set(range(5))


def test_a_rotation_turns_about_the_centre_by_at_most_its_degrees() -> None:
    spot = torch.full((400, 1, 33, 33), 0.5)
    spot[:, 0, 16, 30] = 50.0  # 14 pixels right of the centre
    out = changed("rotate:degrees=30", spot) - 0.5
    rows, columns = (torch.arange(33.0) - 16)[:, None], (torch.arange(33.0) - 16)[None, :]
    mass = out.sum((1, 2, 3))
    y, x = (out[:, 0] * rows).sum((1, 2)) / mass, (out[:, 0] * columns).sum((1, 2)) / mass
    assert (torch.hypot(x, y) - 14).abs().max() < 0.5
    degrees = torch.rad2deg(torch.atan2(y, x))
    assert degrees.abs().max() <= 31
    assert degrees.max() > 25
    assert degrees.min() < -25


def test_a_rotation_of_an_oblong_image_does_not_shear_it() -> None:
    bar = torch.full((50, 1, 20, 40), 0.5)
    bar[:, 0, 8:12, 8:32] = 1.5
    out = changed("rotate:degrees=20", bar) - 0.5
    assert (out.sum((1, 2, 3)) - 4 * 24).abs().max() < 3


def test_draws_depend_on_seed_client_round_step_and_sample_alone() -> None:
    first = changed(ALL)
    torch.rand(7)
    assert torch.equal(changed(ALL), first)
    assert torch.equal(changed(ALL, X[:9]), first[:9])  # whatever else is in the batch
    others = [
        changed(ALL, seed=1),
        *(changed(ALL, at=Position("r", **where)) for where in (
            {"round": 3, "step": 5, "client": 1},
            {"round": 2, "step": 6, "client": 1},
            {"round": 2, "step": 5, "client": 0},
        )),
    ]  # fmt: skip
    for one, other in itertools.combinations([first, *others], 2):
        assert not torch.equal(one, other)
    same = changed(ALL, X[:1].expand(64, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in same}) > 60


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("turn", "unknown augment 'turn'"),
        ("hflip+", "unknown augment ''"),
        ("crop:degrees=3", "crop has no option 'degrees'; it has padding"),
        ("crop:padding=65", "padding must be from 1 to 64"),
        ("crop:padding=0", "padding must be from 1 to 64"),
        ("rotate:degrees=x", "degrees must be of type float"),
        ("rotate:degrees=nan", r"degrees must be in \(0, 180\]"),
    ],
)
def test_changes_that_make_no_sense_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        changes_of(text)


def test_training_batches_are_augmented_and_others_are_not() -> None:
    spec = DATASETS["mnist-5k"]
    both = loaded("mnist-5k")
    plain, turned = (
        part_of(spec, RunConfig(augment=text), 0, both) for text in ("", "rotate:degrees=10")
    )
    indices = torch.arange(8)
    assert torch.equal(plain.training_batch(indices, AT)[0], plain.batch(plain.train, indices)[0])
    x, y = turned.training_batch(indices, AT)
    assert not torch.equal(x, turned.batch(turned.train, indices)[0])
    assert torch.equal(y, turned.train.y[:8])
    assert torch.equal(
        turned.batch(turned.validation, indices)[0], plain.batch(plain.validation, indices)[0]
    )


def test_the_data_sets_augmentation_is_taken_unless_another_is_named() -> None:
    for spec in DATASETS.values():
        changes_of(spec.augment)
    cifar, few = DATASETS["cifar10"], torch.zeros(40, 3, 32, 32)
    assert cifar.augment == "hflip+crop:padding=4"
    both = (Samples(few, torch.arange(40) % 10),) * 2
    taken = [part_of(cifar, RunConfig(augment=a), 0, both).changes for a in ("", "none", "vflip")]
    assert [len(changes) for changes in taken] == [2, 0, 1]


def test_what_comes_in_from_outside_is_the_data_sets_background() -> None:
    spec = DATASETS["femnist"]
    black = Samples(torch.zeros(60, 1, 28, 28), torch.arange(60))
    data = part_of(spec, RunConfig(augment="crop:padding=8"), 0, (black, black))
    x, _ = data.training_batch(torch.arange(12), AT)
    there = (x * spec.std + spec.mean).unique()
    assert torch.allclose(there, torch.tensor([0.0, 1.0]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sflv1", "fl", "sync-sgd"])
def test_a_socket_run_with_augmentation_equals_the_simulation(
    launcher: Launcher, tmp_path: Path, scheme: str
) -> None:
    options = ("--scheme", scheme, "--rounds", 2, "--augment", ALL, "--batch-size", 64)
    sockets = launcher.run(*options)
    same = simulated(tmp_path / "same", augment=ALL, scheme=scheme)
    without = simulated(tmp_path / "without", scheme=scheme)
    assert_equal(weights(sockets), weights(same), at_least=10)
    kept, other = (weights(run)["client_model_001.pt/conv1.weight"] for run in (same, without))
    assert not torch.equal(kept, other)
    report = replay.check(load(sockets))
    assert (report.findings, report.differ, report.models_differ) == ([], 0, 0)
