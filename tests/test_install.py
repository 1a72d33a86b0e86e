"""The package as pip installs it, and the files that say what it needs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sfl
from tests.support.launch import OFFLINE

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = {
    "gcs", "tensorboard", "wandb", "onnx", "ray", "mpi", "websocket", "privacy",
}  # fmt: skip


def listed(name: str) -> set[str]:
    """Return the requirements of a file, each as ``name>=version``."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-")}


def test_requirements_are_those_of_the_package() -> None:
    wanted = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gcs"]}
    assert {r for r in listed("requirements.txt") if not r.startswith("pytest>=")} == wanted
    assert set(PROJECT["optional-dependencies"]) >= EXTRAS
    extras = {r for of in PROJECT["optional-dependencies"].values() for r in of}
    assert {r for r in listed("experiments/requirements.txt") if "openmpi" not in r} <= extras


def test_requirements_begin_with_the_constraints() -> None:
    for name, line in [
        ("requirements.txt", "-c constraints.txt"),
        ("requirements-dev.txt", "-c constraints.txt"),
        ("experiments/requirements.txt", "-c ../constraints.txt"),
    ]:
        assert (ROOT / name).read_text().startswith(f"{line}\n"), name


def test_constraints_are_the_versions_that_are_tested() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = dict(line.split("==") for line in lines)
    other = {
        f"{name}: {metadata.version(name)} is installed, constraints.txt has {version}"
        for name, version in pinned.items()
        if has(name) and Version(metadata.version(name)).public != version
    }
    assert other == set(), "make it anew: .venv/bin/python .ci/constraints > constraints.txt"
    for text in listed("requirements.txt") | listed("requirements-dev.txt"):
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def has(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def test_versions_stand_in_one_place() -> None:
    assert "version" not in PROJECT
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {sfl.__version__}\nlicense: {PROJECT['license']}\n" in citation
    python = PROJECT["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == python
    needed = ast.literal_eval(f"({python.replace('.', ',')})")
    assert f"sys.version_info < {needed}:" in (ROOT / "sfl/__init__.py").read_text()
    assert f"Python {python} or later" in (ROOT / "docs/install.md").read_text()


def test_the_page_lists_programs_and_extras() -> None:
    page = (ROOT / "docs/install.md").read_text()
    assert set(re.findall(r"^\| `(sfl-\w+)`", page, re.MULTILINE)) == set(PROJECT["scripts"])
    rows = "".join(re.findall(r"^\| (`\w+`.*?) \|", page[page.index("## Extras") :], re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(PROJECT["optional-dependencies"])


def run(*command: object, cwd: Path, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder; check its exit code."""
    env = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | OFFLINE
    argv = [str(word) for word in command]
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the clone, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("sfl", "experiments", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "clone" / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "run_server.py", "run_client.py"):
        shutil.copy(ROOT / name, folder / "clone")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, folder / "clone", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    info = f"sfl-{sfl.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        described = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        programs = archive.read(f"{info}/entry_points.txt").decode()
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sfl").rglob("*.py")}
    assert {name for name in names if not name.startswith(f"{info}/")} == ours
    assert described["Version"] == sfl.__version__
    assert described["License-Expression"] == "MIT"
    assert described["Requires-Python"] == PROJECT["requires-python"]
    assert set(described.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert dict(re.findall(r"^([\w-]+) = (.*)$", programs, re.MULTILINE)) == PROJECT["scripts"]


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment, inside another checkout; return its programs.

    The environment sees the libraries of this one.
    """
    checkout = tmp_path_factory.mktemp("installed")
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "a"]
    run("git", "init", cwd=checkout)
    run("git", *commit, cwd=checkout)
    env = checkout / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=wheel.parent)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = env / "lib" / version / "site-packages"
    (libraries / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", env / "bin/python"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    return env / "bin"


@pytest.mark.slow
def test_installed_programs_run_in_any_folder(programs: Path, tmp_path: Path) -> None:
    options = ["--dataset", "mnist-5k", "--model", "mlp", "--rounds", 1, "--clients", 1]
    options += ["--batch-size", 400, "--run", "r"]
    done = run(programs / "sfl-simulate", *options, cwd=tmp_path)
    assert done.stderr == ""
    done = run(programs / "sfl-replay", "shared_files/server/r", cwd=tmp_path)
    assert done.stdout.splitlines()[-1].endswith(" gradients checked, 0 differ")
    assert (
        '"git_commit": "unknown"'
        in (tmp_path / "shared_files/server/r/environment.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROJECT["scripts"]))
def test_an_installed_program_has_its_own_name(programs: Path, tmp_path: Path, name: str) -> None:
    done = run(programs / name, "--version", cwd=tmp_path)
    assert done.stdout == f"SFL {sfl.__version__}\n"
    done = run(programs / name, "--help", cwd=tmp_path)
    assert done.stdout.startswith(f"usage: {name} ")
    assert "experiments" not in done.stdout
    done = run(programs / name, "--no-such", cwd=tmp_path, code=2)
    assert done.stderr.startswith(f"{name}: error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "more", "in_a_clone"),
    [("main_simulate", "", ROOT), ("main_server", ", '--port', '0'", None)],
)
def test_a_run_says_which_library_its_bucket_needs(
    programs: Path, tmp_path: Path, program: str, more: str, in_a_clone: Path | None
) -> None:
    code = (
        "import sys; sys.modules['google'] = None; from sfl import cli;"
        f"sys.exit(cli.{program}(['--weights', 'gs://a-bucket/x'{more}]))"
    )
    python = programs / "python"
    if in_a_clone:
        code = f"import sys; sys.path.insert(0, {str(in_a_clone)!r}); {code}"
    done = run(python, "-c", code, cwd=tmp_path, code=2)
    what = "-r requirements.txt" if in_a_clone else "google-cloud-storage"
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "google is not installed for " in line
    assert line.endswith(f"-m pip install {what}")
