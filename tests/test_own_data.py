"""A client's own data: nothing silently becomes something else, or is left out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfl.config import RunConfig
from sfl.conversation.report import DataReport, check_agreement
from sfl.data.class_names import listed
from sfl.errors import DataError, RunError
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from tests.support.launch import Launcher
from tests.support.private_data import NFC, NFD, RGBA, Own, save, write_image
from tests.support.weights import assert_equal, weights


def test_of_each_class_one_line_says_what_was_left_out_and_why(tmp_path: Path, own: Own) -> None:
    for k in range(4):
        write_image(tmp_path / "a" / f"{k}.png", k)
    write_image(tmp_path / "b" / "0.PNG")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (tmp_path / "a" / name).write_bytes(b"\0\5\x16\7")
    for name in ("x.ppm", "y.jfif", "z.jp2"):
        (tmp_path / "a" / name).touch()
    write_image(tmp_path / "a" / "more" / "5.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    pages = [Image.new("L", (28, 28), grey) for grey in (50, 60, 70)]
    for name in ("pages.tif", "moving.gif", "moving.webp", "moving.png"):
        path = tmp_path / "b" / name
        pages[0].save(path, save_all=True, append_images=pages[1:])
    RGBA.save(tmp_path / "b" / "clear.png")
    data = own(tmp_path)
    assert (len(data.train), len(data.validation)) == (8, 2)
    line = own.line("a/: ")
    assert line.startswith("a/: 4 images read; left out: ")
    for text in (
        "4 hidden or of the system (.DS_Store, ._0.png, Thumbs.db, ...)",
        "1 no file, or a link that leads nowhere (gone.png)",
        "1 in a folder of its own: only what lies in the class's folder itself is read (more)",
        "1 no image by its suffix (notes.txt)",
        "3 of a format that is not read: convert to .png (x.ppm, y.jfif, z.jp2)",
    ):
        assert text in line
    assert own.line("b/: ") == (
        "b/: 6 images read; 4 with further pages or frames: only the first is read;"
        " 1 with transparent pixels: put on white"
    )


def test_what_systems_make_is_no_class(tmp_path: Path, own: Own) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / name / "0.png")
    for name in ("__MACOSX", "@eaDir", ".git", "$RECYCLE.BIN"):
        write_image(tmp_path / name / "0.png")
    write_image(tmp_path / "beside.png")
    assert own(tmp_path).classes == ("a", "b")
    line = own.line(f"{tmp_path}: left out")
    assert "4 hidden or of the system ($RECYCLE.BIN, .git, @eaDir, ...)" in line
    assert "1 beside the folders of the classes (beside.png)" in line


@pytest.mark.parametrize("has_test", [False, True])
def test_val_is_the_validation_part(tmp_path: Path, own: Own, has_test: bool) -> None:
    for k in range(10):
        write_image(tmp_path / "train" / "ab"[k % 2] / f"{k}.png", k)
    write_image(tmp_path / "val" / "b" / "0.png", 77)
    if has_test:
        write_image(tmp_path / "test" / "a" / "0.png", 99)
    (tmp_path / "notes").mkdir()
    write_image(tmp_path / "train" / "astray.png")
    data = own(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 1, int(has_test))
    assert sorted(data.train.x[:, 0, 0, 0].tolist()) == list(range(10))
    assert (data.validation.x[0, 0, 0, 0], data.validation.y.tolist()) == (77, [1])
    assert own.line("train/a/") == "train/a/: 5 images read"
    assert own.line("val/a/") == "val/a/: 0 images read"
    assert own.line("val/b/") == "val/b/: 1 image read"
    assert own.line(f"{tmp_path}: left out") == f"{tmp_path}: left out: 1 beside train/ (notes)"
    write_image(tmp_path / "val" / "c" / "0.png")
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: c"):
        own(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["0.png", "1.png"], r"has 2 images, but no folder says of which class"),
        (["train/0.png"], r"train has 1 image, but no folder says of which class"),
        (["train/a/0.png", "val/0.png"], r"val has 1 image, but no folder says"),
        (["train/a/0.png", "test/0.png"], r"test has 1 image, but no folder says"),
        (["Train/a/0.png", "Val/a/0.png"], r"Train looks like a part of the data, but is none"),
        (["Train/a/0.png", "b/0.png"], r"Train looks like a part of the data"),
        (["train/a/0.png", "Test/a/0.png"], r"Test looks like a part of the data"),
        (["train/a/0.png", "valid/a/0.png"], r"valid looks like a part of the data"),
        (["train/a/0.png", "validation/0.png"], r"validation looks like a part of the data"),
        (["test/a/0.png"], r"test looks like a part of the data"),
        (["train/0.png", "val/0.png", "notes/x.txt"], r"train has 1 image, but no folder says"),
        (["mine/train/a/0.png"], r"holds no training samples"),
        (["train/a/x.txt", "test/a/0.png"], r"holds no training samples"),
    ],
)
def test_another_layout_is_shown_the_one_that_is_wanted(
    tmp_path: Path, own: Own, files: list[str], reason: str
) -> None:
    for name in files:
        write_image(tmp_path / name) if name.endswith("png") else None
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    wanted = r".*DIR/<class>/<image>.png, or DIR/train/<class>/.* DIR/val/<class>/"
    with pytest.raises(DataError, match=reason + wanted):
        own(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path, own: Own) -> None:
    for name in ("bus", "train", "Test"):
        write_image(tmp_path / name / "0.png")
    assert own(tmp_path).classes == ("Test", "bus", "train")


def test_classes_that_look_alike_are_shown_with_their_code_points(tmp_path: Path, own: Own) -> None:
    reports = {
        k: DataReport({"train": 1, "validation": 0, "test": 0}, ("a", name), (1, 28, 28), "0" * 64)
        for k, name in enumerate((NFC, NFD))
    }
    shown = (
        f"client_0 has 2 (a, {NFC} [U+00E9]), client_1 2 (a, {NFD} [U+0065 U+0301]); all need the"
        " same ones, a folder may be empty"
    )
    with pytest.raises(RunError) as caught:
        check_agreement(reports)
    assert str(caught.value) == f"classes differ: {shown}"
    for name in (NFC, NFD):
        write_image(tmp_path / "train" / name / "0.png")
    assert own(tmp_path).classes == (NFD, NFC)
    assert f"{NFD} [U+0065 U+0301], {NFC} [U+00E9]" in own.line(f"{tmp_path / 'train'}: classes")


@pytest.mark.parametrize(
    ("name", "other", "shown"),
    [
        ("cat", "Cat", "cat [U+0063 U+0061 U+0074]"),
        ("cat ", "cat", "cat  [U+0020]"),
        ("c\u200bat", "cat", "c\u200bat [U+200B]"),
        ("\u0441at", "cat", "\u0441at [U+0441]"),
        ("cat", "dog", "cat"),
        (NFC, NFC, NFC),
    ],
)
def test_only_names_that_look_alike_have_code_points(name: str, other: str, shown: str) -> None:
    assert listed(["a", name], ["a", other]) == f"2 (a, {shown})"


def test_of_many_classes_those_that_differ_are_shown() -> None:
    names = [f"{k:02}" for k in range(50)]
    assert listed(names, names[:40] + names[41:]).startswith("50 (40, 00, 01,")


# ---- over sockets


def test_a_client_says_what_it_read_and_the_run_equals_the_simulation(
    launcher: Launcher, tmp_path: Path
) -> None:
    """One client has folders with a validation part, the other floats of another range."""
    folder = tmp_path / "client_0"
    for k in range(20):
        write_image(folder / "train" / "ab"[k % 2] / f"{k}.png", 12 * k)
    write_image(folder / "val" / "a" / "0.png")
    write_image(folder / "train" / "a" / "._0.png")
    (tmp_path / "client_1").mkdir()
    x = np.random.default_rng(0).normal(2, 3, (20, 28, 28))
    save(tmp_path / "client_1", x=x, y=np.array(["a", "b"] * 10), x_val=x[:3], y_val=["a"] * 3)
    text = "mean=0.5,std=0.25"
    options = ["--partition", "own", "--model", "mlp", "--rounds", 1, "--normalize", text]
    server = launcher.server("--clients", 2, "--run", "r", *options)
    clients = [
        launcher.client("--client-id", k, "--data-dir", tmp_path / f"client_{k}") for k in range(2)
    ]
    for program in launcher.programs:
        program.ended_with(0)
    assert "client_0 is ready: 20 train, 1 validation, 0 test samples" in server.out
    line = "train/a/: 10 images read; left out: 1 hidden or of the system (._0.png)"
    log = (tmp_path / "client" / "r" / "client_0" / "client_log.txt").read_text()
    assert line in clients[0].out
    assert line in log
    assert "3 samples for validation" in clients[1].out
    assert f"normalised by {text}: samples have mean" in clients[1].out
    run = RunConfig(
        partition="own", model="mlp", rounds=1, clients=2, run="s", normalize=text
    )  # fmt: skip
    one_process = simulate(run, NodeConfig(out=str(tmp_path), data_dir=str(tmp_path)))
    assert_equal(weights(tmp_path / "server" / "r"), weights(one_process))
