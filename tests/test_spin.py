"""Waiting awake for a short while: what it finds, when it sleeps, when it leaves the core."""

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from sfl import spin
from sfl.spin import Spinner


@pytest.fixture(autouse=True)
def _quiet_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody else want the core, whatever this machine is doing."""
    monkeypatch.setattr(spin, "_switches", lambda: 0)
    monkeypatch.setattr(spin, "_OURS", 1)
    monkeypatch.setattr(spin, "SPIN_S", 1.0)


def finds_at(count: int) -> Callable[[], str | None]:
    looks = itertools.count(1)
    return lambda: "looked" if next(looks) == count else None


def slept() -> str:
    return "slept"


def warm() -> Spinner:
    """Return one whose last wait was short."""
    spinner = Spinner()
    spinner.wait(lambda: None, slept)
    return spinner


def test_the_first_wait_sleeps() -> None:
    assert Spinner().wait(finds_at(1), slept) == "slept"


def test_after_a_short_wait_it_looks() -> None:
    assert warm().wait(finds_at(3), slept) == "looked"


def test_zero_is_a_find() -> None:
    started = time.perf_counter()
    assert warm().wait(lambda: 0, lambda: 1) == 0
    assert time.perf_counter() - started < spin.SPIN_S


def test_it_sleeps_when_it_has_looked_for_long() -> None:
    spinner = warm()
    started = time.perf_counter()
    assert spinner.wait(lambda: None, slept) == "slept"
    assert time.perf_counter() - started >= spin.SPIN_S


def test_after_a_long_wait_it_does_not_look() -> None:
    spinner = warm()
    spinner.wait(lambda: None, lambda: time.sleep(1.5 * spin.SPIN_S))
    assert spinner.wait(finds_at(1), slept) == "slept"
    assert spinner.wait(finds_at(1), slept) == "looked"  # that one was short again


def rests(spinner: Spinner, waits: int) -> str:
    """Return in which of some waits in vain it looked (1), and which it slept through (0)."""
    looks = ""
    for _ in range(waits):
        looked: list[None] = []
        spinner.wait(lambda looked=looked: looked.append(None), slept)  # type: ignore[misc]
        looks += str(len(looked))
    return looks


def test_it_rests_longer_and_longer_while_others_want_the_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switches = itertools.count()
    monkeypatch.setattr(spin, "_switches", lambda: next(switches))
    monkeypatch.setattr(spin, "_MAX_REST", 7)
    spinner = warm()
    assert rests(spinner, 32) == "11010001000000010000000100000001"
    monkeypatch.setattr(spin, "_switches", lambda: 0)
    assert rests(spinner, 7) == "0000000"
    assert spinner.wait(finds_at(2), slept) == "looked"  # the core is ours again
    monkeypatch.setattr(spin, "_switches", lambda: next(switches))
    assert rests(spinner, 4) == "1101"


def test_a_system_that_cannot_tell_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_OURS", None)
    assert warm().wait(finds_at(1), slept) == "slept"


def test_another_thread_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if spin._OURS is None:
        pytest.skip("this system does not say who else wants the core")
    before = spin._switches()
    ready = threading.Event()
    threading.Timer(0.02, ready.set).start()
    ready.wait()
    assert spin._switches() > before


def test_a_core_that_was_taken_counts_as_one_that_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    usage = SimpleNamespace(ru_nivcsw=3, ru_nvcsw=40)
    monkeypatch.setattr(spin, "_OURS", 1)
    monkeypatch.setattr(spin, "resource", SimpleNamespace(getrusage=lambda who: usage))
    assert spin._switches() == 43


def pieces(count: int, done: list[str]) -> Callable[[], bool]:
    """Return something to do meanwhile, of so many pieces."""

    def do() -> bool:
        done.append("piece")
        return len(done) <= count

    return do


def test_other_things_are_done_before_it_sleeps() -> None:
    done: list[str] = []
    assert Spinner(pieces(3, done)).wait(lambda: None, lambda: str(len(done))) == "4"


def test_it_looks_after_every_piece() -> None:
    done: list[str] = []
    assert Spinner(pieces(9, done)).wait(finds_at(3), slept) == "looked"
    assert len(done) == 3
