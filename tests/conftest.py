import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import tests.support.digits  # noqa: F401
from tests.support.launch import Launcher

# Tests of real data are collected if they are there; all others do without the caller's folder.
REAL_DATA = Path(os.environ["SFL_DATA_DIR"]).resolve() if os.environ.get("SFL_DATA_DIR") else None
collect_ignore = [] if REAL_DATA else ["test_real_data.py"]

# Time on a shared machine says nothing about the code.
settings.register_profile("sfl", deadline=None)
settings.load_profile("sfl")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Compute as the programs do by default, and without the caller's data folder."""
    torch.set_num_threads(1)
    os.environ.pop("SFL_DATA_DIR", None)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.end()
