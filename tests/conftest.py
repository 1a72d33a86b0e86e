import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import tests.support.digits  # noqa: F401
from tests.support.certificates import Certificates
from tests.support.chromium import Chromium
from tests.support.emulator import Emulator, Gate, emulated
from tests.support.handshakes import FAST, OTHER, TOKEN, token_file
from tests.support.launch import Launcher, Program, wait_for
from tests.support.private_data import Own

# Tests of real data are collected if they are there; all others do without the caller's folder.
REAL_DATA = Path(os.environ["SFL_DATA_DIR"]).resolve() if os.environ.get("SFL_DATA_DIR") else None
collect_ignore = [] if REAL_DATA else ["test_real_data.py"]

# Time on a shared machine says nothing about the code.
settings.register_profile("sfl", deadline=None)
settings.load_profile("sfl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts the programs as slow: each start takes seconds."""
    for item in items:
        if "launcher" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Compute as the programs do by default, and without the caller's data folder."""
    torch.set_num_threads(1)
    os.environ.pop("SFL_DATA_DIR", None)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Undo what a program that runs in a test's process does to signals: its end ignores them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def launcher(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launcher]:
    """What starts programs; its parameter, if it has one, is their transport."""
    launcher = Launcher(tmp_path, transport=getattr(request, "param", "tcp"))
    if launcher.transport != "tcp":
        pytest.importorskip("websockets")
    yield launcher
    launcher.end()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def own() -> Own:
    return Own()


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Emulator, Gate]]:
    with emulated(tmp_path_factory.mktemp("cloud")) as both:
        yield both


@pytest.fixture
def gate(cloud: tuple[Emulator, Gate], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A bucket that behaves; faults that a test sets end with it."""
    gate = cloud[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gate.address)
    gate.log.clear()
    yield gate
    gate.faults = lambda request: None


@pytest.fixture
def guarded(launcher: Launcher, tmp_path: Path) -> Program:
    """A server that waits for one client with a token of its own."""
    path = token_file(tmp_path, f"0 {TOKEN}", f"1 {OTHER}")
    server = launcher.server(*FAST, "--clients", 1, "--run", "r", "--token-file", path)
    wait_for(server, "listening")
    return server


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests; each opens tabs of its own."""
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
