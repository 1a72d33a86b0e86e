"""What cannot be split or trained as it was written is refused before the start, by block."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfl.config import RunConfig
from sfl.data.client_data import DatasetSpec
from sfl.data.samples import Samples
from sfl.errors import ConfigError
from sfl.model.topology import Holder, joined
from sfl.model.zoo import MODELS, build, model_spec, split
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import (
    check_model,
    needs_several_samples,
    try_in_order,
    unordered,
)
from tests.support import odd_models
from tests.support.launch import Launcher

SHAPE, CLASSES = (1, 28, 28), 10


def split_model(name: str, **options: Any) -> SplitModel:
    named = name if name in MODELS else f"tests.support.odd_models:{name}"
    return SplitModel(Recipe.of(RunConfig(model=named, **{"cut": 3} | options)), SHAPE, CLASSES)


def tried(name: str, **options: Any) -> SplitModel:
    made = split_model(name, **options)
    check_model(made)
    return made


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tied", r"block 2 \(Linear\) .* block 4 \(Linear\) .*'2.weight', '4.weight'"),
        ("tied_by_a_view", r"share a parameter .*: cut in front of block 2 or behind block 4"),
        ("tied_buffer", "share a buffer .'2.scale', '4.scale'"),
        ("tied_in_a_list", r"block 4 \(Hidden\) computes with a parameter \[32, 32\] that is not"),
        ("tied_in_a_function", r"block 4 \(Apply\) computes with a parameter"),
        ("own_forward", r"OwnForward, is an nn.Sequential with forward\(\) of its own"),
        ("own_call", r"with __call__\(\) of its own"),
        ("own_train", r"with train\(\) of its own"),
        ("own_forward_on_the_object", r"with forward\(\) of its own"),
        ("own_hook", "with hooks of its own"),
        ("own_parameter", "with a parameter 'scale' of its own"),
        ("own_buffer", "with a buffer 'scale' of its own"),
        ("plain_module", r"not a Plain .* return nn.Sequential\(net.conv, net.fc\) .* nn.Flatten"),
        ("fails", r"cannot be built .*: KeyError: 'no such layer' \(odd_models.py, line \d+\)"),
        ("lazy", r"block 1 \(LazyLinear\) is lazy.* give it its sizes"),
        ("complex_weights", r"block 2 \(Scale\) has '2.scale' as a strided complex64 tensor"),
        ("four_of_each", r"block 2 \(Apply\) .* gives \[4, 8\] for a batch of 1: the first dim"),
        ("squeezed", r"block 4 \(Apply\) gives \[10\] for a batch of 1: the first dimension"),
        ("pairs", r"block 3 \(Apply\) cannot train on a batch of 3"),
        ("columns_by_batch", r"block 2 \(ByBatch\) .* gives \[2\] float32 for each of 2 samples"),
        ("two_tensors", r"block 2 \(Apply\) .* gives a tuple of 2.* cut at --cut 1 or 2 or 4$"),
        ("named_tensors", r"block 2 \(Apply\) in front of the cut gives a dict of 2"),
        ("auxiliary", r"block 4 \(Auxiliary\) gives a tuple of 2"),
        ("complex_numbers", r"block 2 \(Apply\) in front of the cut gives complex64"),
        ("whole_numbers", "gives int64.* floating-point"),
        ("eight_bits", "gives float8_e5m2.* travels"),
        ("stored", r"block 4 \(Add\) cannot evaluate .* KeyError: 'x' .* --cut 1 or 2 or 5$"),
        ("stored_if_there", r"block 4 \(Add\) gives something else .* --cut 1 or 2 or 5$"),
        ("counts", r"block 3 \(Counts\) gives something else for the same batch after other"),
        ("grows", "changes the shape of '3.last'"),
        ("raises", r"block 3 \(Raises\) cannot train on a batch of 2: AttributeError: .*line"),
        ("opens_a_file", r"block 3 \(Apply\) cannot evaluate a batch of 1: /nowhere/weights: No"),
        ("raises_backward", r"the gradients of block 4 \(Apply\) fail: IndexError: no way back"),
        ("sparse", r"block '1' of the model gives '1.1.weight' a sparse gradient.* sparse=True"),
        ("detaches", r"block 4 \(Apply\) gives no gradient back"),
        ("not_copied", r"block 3 \(Identity\) cannot be copied"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_or_trained_is_refused(name: str, said: str) -> None:
    cut = {"pairs": 1, "counts": 2, "grows": 2, "raises": 2, "sparse": 2}.get(name, 3)
    with pytest.raises(ConfigError, match=said) as caught:
        tried(name, cut=cut)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "cut"), [("time_first", 1), ("keeps", 1)])
def test_recurrent_layers_are_told_what_to_do(name: str, cut: int) -> None:
    said = {
        "time_first": r"block 0 \(Recurrent\) .* gives \[28, 1, 32\] .* batch_first=True.* --cut 2",
        "keeps": r"block 0 \(Keeps\) cannot evaluate .* after other batches: a block keeps",
    }
    with pytest.raises(ConfigError, match=said[name]):
        tried(name, cut=cut)


@pytest.mark.parametrize(
    "name",
    ["tied", "tied_by_a_view", "tied_buffer", "tied_in_a_list", "two_tensors", "complex_numbers",
     "stored", "stored_if_there", "four_of_each", "own_init"],
)  # fmt: skip
def test_what_is_well_without_a_cut_is_not_refused_there(name: str) -> None:
    tried(name, scheme="fl", cut=1)


@pytest.mark.parametrize(
    "name",
    ["own_init", "side_by_side", "counts_in_a_buffer", "norm_over_one_pixel", "bfloat16", "frozen",
     "frozen_back", "mlp", "lenet5", "cnn-mnist"],
)  # fmt: skip
def test_what_can_be_split_works(name: str) -> None:
    tried(name)


def test_a_subclass_with_its_own_init_is_split_as_it_computes() -> None:
    whole = build(model_spec("tests.support.odd_models:own_init"), SHAPE, CLASSES, seed=0).eval()
    front, back = split(whole, 2)
    x = torch.rand(4, *SHAPE)
    assert torch.equal(back(front(x)), whole(x))
    with pytest.raises(ConfigError, match=r"forward\(\) of its own"):
        split(odd_models.own_forward(SHAPE, CLASSES), 2)


def test_the_check_leaves_everything_as_it_was() -> None:
    for draw in (torch.manual_seed, random.seed, np.random.seed):
        draw(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made = split_model("frozen")
    before = {n: t.clone() for n, t in joined(made.initial(*Holder)).items()}
    check_model(made)
    assert needs_several_samples(made)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    after = joined(made.initial(*Holder))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not any(p.grad is not None for row in made._segments.values() for p in row.parameters())


def test_who_needs_several_samples_is_known() -> None:
    found = needs_several_samples(split_model("norm_over_one_pixel"))
    assert found is not None
    assert found.startswith("block 1 (BatchNorm2d) cannot train on a batch of 1: ")
    assert needs_several_samples(split_model("mlp")) is None
    assert needs_several_samples(split_model("bfloat16")) is None
    check_model(split_model("mlp", batch_size=1))
    with pytest.raises(ConfigError, match=r"--batch-size 1: give at least 2: block 1 \(BatchNorm"):
        check_model(split_model("norm_over_one_pixel", batch_size=1))


# With data of a user's own.


def wide() -> DatasetSpec:
    x, y = torch.zeros(40, 1, 6, 9, dtype=torch.uint8), torch.arange(40) % 2
    return DatasetSpec(lambda source: (Samples(x, y), Samples(x, y)), (1, 6, 9), ("a", "b"), 0.5, 1)


def test_a_server_refuses_a_model_before_anybody_connects(launcher: Launcher) -> None:
    for options, said in (
        (
            ["--model", "tests.support.odd_models:raises", "--cut", 2],
            "block 3 (Raises) cannot train",
        ),
        (["--model", "tests.support.odd_models:tied", "--cut", 3], "share a parameter"),
        (
            [
                "--model",
                "tests.support.odd_models:own_init",
                "--cut",
                2,
                "--dataset",
                "tests.test_start_check:wide",
            ],
            "does not take samples of shape [1, 6, 9]",
        ),
    ):
        server = launcher.server("--clients", 2, *options)
        assert said in server.ended_with(2)
        assert "listening" not in server.out
    assert not (launcher.folder / "server").exists()


def test_a_server_that_does_not_know_the_classes_refuses_before_the_first_step(
    launcher: Launcher, tmp_path: Path
) -> None:
    """The model fits the ten classes of the data set, not the two of the folders."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(8):
            pixels = np.full((28, 28), 9 * k, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{k}.png")
    model = "tests.test_start_check:counts_if_two"
    server = launcher.server("--clients", 1, "--partition", "own", "--dataset", "mnist",
                             "--model", model, "--cut", 2)  # fmt: skip
    client = launcher.client("--data-dir", tmp_path / "data", "--allow-import", model)
    said = "block 2 (Counts) gives something else for the same batch after other batches"
    assert said in server.ended_with(2)
    assert said in client.ended_with(1)
    assert not list((launcher.folder / "server").glob("*/rounds/*"))


def counts_if_two(shape: tuple[int, ...], classes: int) -> torch.nn.Sequential:
    block = odd_models.Counts(persistent=False) if classes == 2 else torch.nn.ReLU()
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 8), block, torch.nn.Linear(8, classes)
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_order", r"block 2 \(Apply\): put_ has no deterministic form"),
        (
            "no_order_backward",
            r"block 3 \(Apply\): made_up_backward_cuda has no deterministic form",
        ),
        ("lenet5", "^$"),
    ],
)
@pytest.mark.parametrize("cut", [2, 4])
def test_what_has_no_deterministic_form_is_named_by_its_block(
    name: str, said: str, cut: int
) -> None:
    made = tried(name, cut=cut)  # fine, as far as the CPU's order is fixed
    devices = {Holder.SERVER: torch.device("cpu")}
    assert re.search(said, try_in_order(made, devices))
    assert not torch.are_deterministic_algorithms_enabled()
    assert unordered(made, devices) == ""


def test_a_model_that_fails_elsewhere_is_no_matter_of_order() -> None:
    with pytest.raises(ConfigError, match=r"block 3 \(Apply\) cannot train on a batch of 3"):
        try_in_order(split_model("pairs"), {})


def test_only_the_parties_of_this_machine_are_tried_on_its_device() -> None:
    trial = split_model("lenet5", cut="3,9").trial(devices={Holder.SERVER: torch.device("meta")})
    assert [segment.device.type for segment in trial._segments] == ["cpu", "meta", "cpu"]
