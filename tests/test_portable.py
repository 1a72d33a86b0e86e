"""The file of one part of a trained model: what is written is read, and nothing strange is."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments.hostile.files import EVIL
from sfl.errors import IntegrityError, RunError
from sfl.files.torch_file import encode, encode_state
from sfl.model.portable import ENTRY, About, Portable, read_portable, write_portable

ABOUT = About(
    part="front", model="mlp", cuts=(3,), task="classification", input_shape=(1, 28, 28),
    takes=(1, 28, 28), mean=(0.1307,), std=(1 / 3,), classes=("0", "ä ß"), run="r", seed=-1,
    round=-1, back_checksum="", sfl_version="0.3.0",
)  # fmt: skip
STATE = {
    "norm.num": torch.tensor(3),
    "fc1.weight": torch.randn(4, 3),
    "fc1.half": torch.ones(2).half(),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_portable(tmp_path / "front.pt", Portable(STATE, ABOUT))
    return tmp_path / "front.pt"


def test_what_is_written_is_read(path: Path) -> None:
    read = read_portable(path)
    assert read.about == ABOUT
    assert list(read.state) == list(STATE)
    assert all(torch.equal(read.state[n], STATE[n]) for n in STATE)
    assert all(read.state[n].dtype is STATE[n].dtype for n in STATE)


def test_plain_torch_reads_it(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    about = json.loads(bytes(state.pop(ENTRY)))
    assert about["classes"] == ["0", "ä ß"]
    assert about["std"] == [1 / 3]
    assert list(state) == list(STATE)


def same(one: Portable, other: Portable) -> bool:
    equal = (torch.equal(other.state[name], tensor) for name, tensor in one.state.items())
    return one.about == other.about and one.state.keys() == other.state.keys() and all(equal)


def test_a_flipped_bit_is_seen_or_changes_nothing(path: Path) -> None:
    """It changes nothing in the dates of the container."""
    data, whole = path.read_bytes(), read_portable(path)
    refused = 0
    places = range(0, len(data), 7)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        try:
            assert same(read_portable(path), whole), place
        except IntegrityError:
            refused += 1
    assert refused > 0.5 * len(places)


FOREIGN = {
    "nothing": (b"", "its end is not there"),
    "a picture": (b"\x89PNG" * 50, "its end is not there"),
    "a tensor": (encode(torch.ones(3)), "holds one tensor"),
    "only weights": (encode_state(STATE), r"none that sfl-export --to torch writes"),
    "floats about it": (encode_state({ENTRY: torch.ones(3)}), "none that sfl-export"),
    "code": (EVIL, "front.pt: "),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_in_a_line(name: str, path: Path) -> None:
    data, message = FOREIGN[name]
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=message) as failed:
        read_portable(path)
    assert str(failed.value).startswith(str(path))
    assert "\n" not in str(failed.value)


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none\.pt: No such file"):
        read_portable(tmp_path / "none.pt")
    with pytest.raises(RunError, match="Is a directory"):
        read_portable(tmp_path)


STRANGE = {
    "part": ["", 3, "x" * 201], "model": [None], "cuts": [3, [-1], [3.0], ["3"], [True]],
    "task": [[]], "input_shape": [[], [0], [2**40], [1.0], "28"], "takes": [[-1]],
    "mean": [[], 0.1, [float("nan")], [1]], "std": [[0.0], [-1.0], [float("inf")]],
    "classes": [[], [1], "ab"], "run": [7], "seed": [1.5, "1"], "round": [-2, None, 1.0],
    "back_checksum": [None, "x" * 65], "sfl_version": [1],
    "format": [2, "1", None],
}  # fmt: skip


def test_every_field_is_checked() -> None:
    assert STRANGE.keys() == {field.name for field in dataclasses.fields(About)}
    fields = json.loads(ABOUT.to_json())
    assert About.from_json(ABOUT.to_json().encode()) == ABOUT
    for name, values in STRANGE.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"its {name} is"):
                About.from_json(json.dumps(fields | {name: value}).encode())
    for other in [{n: v for n, v in fields.items() if n != "mean"}, fields | {"more": 1}]:
        with pytest.raises(ValueError, match="its fields are not"):
            About.from_json(json.dumps(other).encode())
    for text in (b"", b"[]", b"{", b"\xff", b"1"):
        with pytest.raises(ValueError):  # noqa: PT011 - of any kind
            About.from_json(text)
