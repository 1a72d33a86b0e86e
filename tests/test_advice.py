"""What a program says when it was started wrongly, and where it can be started at all."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfl
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError, quoted, shortened
from sfl.nodes import ClientNode, ServerNode
from sfl.options import parse_options
from sfl.runtime.preflight import check_disk
from sfl.strategy.recipe import Recipe
from sfl.wire.link import one_line

ROOT = Path(__file__).parent.parent
PROGRAMS_PAGE = (ROOT / "docs/programs.md").read_text()
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
    for path in ROOT.glob("experiments/**/[!_]*.py")
    if "__main__" in path.read_text() and "peers" not in path.parts
) + [path.parent.name for path in ROOT.glob("experiments/*/__main__.py")]
SIMULATE = [
    "-m", "experiments.simulate", "--model", "mlp", "--clients", "1", "--rounds", "1",
    "--batch-size", "400", "--run", "r",
]  # fmt: skip


def server(*argv: str) -> object:
    return parse_options(argv, RunConfig, ServerNode, prog="run_server.py", about="")


def client(*argv: str) -> object:
    return parse_options(argv, ClientNode, prog="run_client.py", about="")


def python(*argv: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *argv]
    pipe = subprocess.PIPE
    defaults = {"cwd": ROOT, "text": True, "stdout": pipe, "stderr": pipe, "timeout": 120}
    return subprocess.run(command, check=False, **defaults | options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rouds", "3"], "unknown option '--rouds'; did you mean --rounds"),
        (["--ROUNDS=3"], "unknown option '--ROUNDS'; did you mean --rounds"),
        (["--batchsize", "3"], "did you mean --batch-size"),
        (["--xyzzyx"], r"unknown option '--xyzzyx'; see --help"),
        (["--client-id", "3"], r"--client-id is an option of run_client\.py, not of run_server"),
        (["stray"], r"unexpected argument 'stray' \(see --help\)"),
    ],
)
def test_an_unknown_option_is_answered_with_what_was_meant(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        server(*argv)
    with pytest.raises(ConfigError, match=r"--rounds is an option of run_server\.py"):
        client("--rounds", "3")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "SFLv-1"}, "unknown scheme 'SFLv-1'; did you mean sflv1"),
        ({"model": "MLP"}, "unknown model 'MLP'; did you mean mlp"),
        ({"model": "LeNet"}, "did you mean lenet5"),
        ({"dataset": "MNIST"}, "unknown data set 'MNIST'; did you mean mnist"),
        ({"partition": "dirchlet:0.1"}, "did you mean dirichlet"),
        ({"optimizer": "Adm"}, "did you mean adam"),
        ({"aggregation": "FedAdm"}, "did you mean fedadam"),
        ({"lr_schedule": "cosin"}, "did you mean cosine"),
        ({"augment": "hflp"}, "did you mean hflip"),
        ({"weights": "sokcet"}, "did you mean socket"),
    ],
)
def test_an_unknown_name_is_answered_with_what_was_meant(
    options: dict[str, str], said: str
) -> None:
    from sfl.runtime.preflight import check_run

    with pytest.raises(ConfigError, match=said):
        check_run(RunConfig(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[run]\nRound = 3", "unknown option in .*'Round'; did you mean rounds"),
        ("[serevr]\nport = 3", "unknown table in .*'serevr'; did you mean server"),
        ("[client]\nrounds = 3", r"rounds is no option of the table \[client\]"),
    ],
)
def test_a_files_keys_and_tables_are_checked(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    for options in (server, client):  # by every program, whosever table it is
        with pytest.raises(ConfigError, match=said):
            options("--config", str(tmp_path / "run.toml"))


def test_texts_are_cut_between_words() -> None:
    words = "the quick brown fox jumps over the lazy dog"
    assert shortened(words, 43) == words
    for most in range(12, 43):
        cut = shortened(words, most)
        assert len(cut) <= most
        assert cut.endswith("...")
        assert words.startswith(cut.removesuffix("..."))
        assert words[len(cut) - 3] == " "
    assert shortened("x" * 50, 20) == "x" * 20  # one long word
    assert one_line("word " * 200).endswith(" word...")
    assert quoted("it's " * 30, 20) == "\"it's it's it's...\""
    assert quoted([1] * 100, 20) == "[1, 1, 1, 1, 1,..."


def test_disk_advice_names_what_helps_and_was_not_given(tmp_path: Path) -> None:
    """Each option that is left out saves so much; the disk is smaller than what is asked for."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize

    def advice(tensors: float, models: float, *, may_change: bool = True, **given: str) -> str:
        def needed(recipe: Recipe) -> int:
            run = recipe.run
            of_tensors = {"all": tensors, "last": tensors / 1e6, "none": 0}[run.keep_tensors]
            return int(free * (of_tensors + (models if run.keep_models == "all" else models / 1e6)))

        with pytest.raises(RunError) as error:
            check_disk(tmp_path, Recipe.of(RunConfig(**given)), needed, may_change=may_change)  # type: ignore[arg-type]
        return str(error.value).rpartition(" are free: ")[2]

    assert advice(3, 0) == "give --keep-tensors last or none, or another --out"
    assert advice(0, 3) == "give --keep-models last, or another --out"
    assert advice(0, 3, keep_tensors="none") == "give --keep-models last, or another --out"
    both = "give --keep-tensors last or none and --keep-models last, or another --out"
    assert advice(3, 3) == both
    assert advice(3, 3, keep_tensors="none") == "give --keep-models last, or another --out"
    assert advice(3, 3, keep_models="last") == "give --keep-tensors last or none, or another --out"
    nothing = "give fewer --rounds, or another --out"
    assert advice(9e9, 9e9, keep_tensors="last", keep_models="last") == nothing
    assert advice(3, 3, may_change=False) == "make space, then go on"


@pytest.mark.parametrize("program", ["run_server.py", "run_client.py"])
def test_each_program_says_which_sfl_it_is(tmp_path: Path, program: str) -> None:
    """From any folder, though the package is not installed."""
    done = python(str(ROOT / program), "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"SFL {sfl.__version__}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("program", [*(f"experiments.{name}" for name in PROGRAMS), "sfl.auth"])
def test_each_study_says_which_sfl_it_is(program: str) -> None:
    done = python("-m", program, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"SFL {sfl.__version__}\n", "")


def test_a_support_module_says_that_it_is_no_program() -> None:
    listed = set(re.findall(r"^\| `python -m (\S+)\b", PROGRAMS_PAGE, re.MULTILINE))
    assert listed == {f"experiments.{name}" for name in PROGRAMS}
    for name in ("replay.train_back", "support.processes"):
        done = python("-m", f"experiments.{name}")
        assert done.returncode == 1
        assert done.stderr == (
            f"experiments.{name} is no program; docs/programs.md has a table of those there are\n"
        )


# An installation that lacks something. What is run first must be readable by an older Python.

FIRST = ["run_server.py", "run_client.py", "sfl/__init__.py", "experiments/__init__.py"]


@pytest.mark.parametrize("path", FIRST)
def test_an_older_python_reads_what_runs_first(path: str) -> None:
    ast.parse((ROOT / path).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("program", ["run_server.py", "run_client.py", "experiments"])
def test_an_older_python_gets_one_line(program: str) -> None:
    old = "import sys, runpy; sys.version_info = (3, 10, 12, 'final', 0); "
    run = f"runpy.run_path({program!r}, run_name='__main__')"
    if program == "experiments":
        run = "runpy.run_module('experiments.replay', run_name='__main__')"
    done = python("-c", old + run)
    assert done.returncode == 1
    assert done.stderr.startswith("SFL needs Python 3.11 or later; ")
    assert "is Python 3.10." in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("run_server.py", "torch"), ("run_client.py", "torch"), ("experiments.simulate", "torch"),
        ("experiments.simulate", "tqdm"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line(program: str, package: str) -> None:
    missing = f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv = ['x']; "
    run = f"runpy.run_path({program!r}, run_name='__main__')"
    if program.startswith("experiments"):
        run = f"runpy.run_module({program!r}, run_name='__main__')"
    done = python("-c", missing + run)
    assert done.returncode == 1
    assert f"error: {package} is not installed for {sys.executable}: " in done.stderr
    assert done.stderr.endswith("-m pip install -r requirements.txt\n")
    assert len(done.stderr.splitlines()) == 1


# Standard streams that are not there, or that nobody reads


@pytest.mark.slow
@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]])
def test_a_program_runs_without_standard_streams(tmp_path: Path, closed: list[int]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    argv = [*SIMULATE, "--out", str(tmp_path)]
    done = python(*argv, preexec_fn=close)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "server/r/server_log.txt").read_text()
    assert "test accuracy" in log
    assert log.splitlines()[-1].endswith(f"the run lies in {tmp_path / 'server/r'}")
    assert "round 1/1" in done.stdout or 1 in closed
    failed = python(*argv, preexec_fn=close)
    assert failed.returncode == 2  # a run of that name exists
    assert "a run r exists" in failed.stderr or 2 in closed


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_program_runs_when_nobody_reads_its_output(tmp_path: Path, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = python(*SIMULATE, "--out", str(tmp_path), stdout=writing, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the run lies in" in (tmp_path / "server/r/server_log.txt").read_text()


@pytest.mark.slow
def test_a_name_without_a_port_is_a_servers_address() -> None:
    """Nobody listens there: the address is what is said."""
    done = python("run_client.py", "--server", "127.0.0.1", "--connect-timeout", "0.2")
    assert done.returncode == 1
    assert "127.0.0.1:8765" in done.stderr + done.stdout
