"""Waiting awake for a short while: what it finds, when it sleeps, when it leaves the core."""

import itertools
import os
import time
from collections.abc import Callable

import pytest

from sfl import spin
from sfl.spin import Spinner


@pytest.fixture(autouse=True)
def _looks_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_CAN_YIELD", True)
    monkeypatch.setattr(os, "sched_yield", lambda: None, raising=False)
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


def test_it_leaves_the_core_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    yields: list[str] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append("yield"))
    assert warm().wait(finds_at(3), slept) == "looked"
    assert yields == ["yield", "yield"]


def test_a_system_without_yielding_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_CAN_YIELD", False)
    assert warm().wait(finds_at(1), slept) == "slept"


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
