"""Processes that have torch, torchvision, numpy and tqdm, what these need, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.launch import OFFLINE

ROOT = Path(__file__).parent.parent.parent
# Python imports it at its start, in each process: other packages are then as if not installed.
_HIDING = """
import sys
from importlib.machinery import PathFinder

THERE = {
    "torch", "torchgen", "functorch", "torchvision", "numpy", "tqdm",
    "PIL", "cuda", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "nvidia",
    "setuptools", "sympy", "triton", "typing_extensions",
}
find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    spec = find(name, path, target)
    if spec is None or path is not None or name in THERE:
        return spec
    places = [spec.origin, *(spec.submodule_search_locations or [])]
    return None if any("site-packages" in str(place) for place in places) else spec

PathFinder.find_spec = find_spec
"""


def run_bare(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` in the repository's root, with nothing else, as all that it starts."""
    (folder / "sitecustomize.py").write_text(_HIDING)
    own = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "SFL_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )
