"""The checks of results, one after another: what is compared with what, on which devices."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from experiments.gpu_check.exact_runs import (
    KILLED_ROUNDS,
    NUM_CLIENTS,
    Case,
    Place,
    in_one_process,
    killed,
    over_sockets,
)
from experiments.gpu_check.made_images import write_own
from experiments.gpu_check.waits import without_other_waits
from experiments.gpu_check.worker import Row, Seen
from experiments.support.same_run import compare

NUM_SAMPLES = 100  # of each client, of which a fifth is held out: 4 steps a round
_OPTIONS = {
    "sflv1, reset": ("--scheme", "sflv1"),
    "sflv1, keep": ("--scheme", "sflv1", "--optimizer-state", "keep"),
    "sflv2, keep": ("--scheme", "sflv2", "--optimizer-state", "keep"),
    "u-shaped, reset": ("--scheme", "sflv2", "--cut", "3,9"),
    "u-shaped, keep": ("--scheme", "sflv1", "--cut", "3,9", "--optimizer-state", "keep"),
}


def checks(device: str, folder: Path, *, is_dry: bool) -> Iterator[Row]:
    """Yield all checks of results on a device; a dry run has one of each kind."""
    data = folder / "data"
    write_own(data, NUM_CLIENTS, NUM_SAMPLES)
    mixed, alone = _places(device)
    cases = [Case(t, _OPTIONS[t], p, data) for t, p in itertools.product(_OPTIONS, (mixed, alone))]
    if both := _two_devices(device):
        cases.append(Case("sflv1, keep", _OPTIONS["sflv1, keep"], both, data))
    killed_cases = [
        Case(t, _OPTIONS[t], p, data, rounds=KILLED_ROUNDS)
        for t, p in (("sflv1, keep", mixed), ("u-shaped, keep", alone))
    ]
    strict_cases = [
        Case(t, (*_OPTIONS[t], *more, "--clients", "1"), alone, data)
        for t, more in (
            ("sflv1, reset", ()),
            ("u-shaped, keep", ("--optimizer", "sgd", "--momentum", "0.9", "--clip-norm", "1")),
        )
    ]
    if is_dry:
        cases, killed_cases, strict_cases = cases[-1:], killed_cases[-1:], strict_cases[-1:]
    for number, case in enumerate(cases):
        own = folder / f"same_{number}"
        yield Row(f"sockets = simulation: {case}", partial(_same, case, own, 1 if is_dry else 2))
    for number, case in enumerate(strict_cases):
        simulate = partial(in_one_process, case, folder / f"strict_{number}")
        title = f"no wait but for what is sent: {case}{', clipped' if number else ''}"
        yield Row(title, partial(without_other_waits, simulate))
    for number, case in enumerate(killed_cases):
        own = folder / f"killed_{number}"
        yield Row(f"client and server killed: {case}", partial(_survives, case, own))


def _places(device: str) -> tuple[Place, Place]:
    return (
        Place(f"server on {device}, clients on cpu", device, "cpu"),
        Place(f"all on {device}", device, device),
    )


def _two_devices(device: str) -> Place | None:
    """Return a server with its copies on two devices, if there are two; on a CPU, on it twice."""
    if device == "cpu":
        return Place("server on cpu,cpu", "cpu,cpu", "cpu")
    if device != "cuda" or torch.cuda.device_count() < 2:
        return None
    return Place("server on cuda:0,cuda:1", "cuda:0,cuda:1", "cpu")


def _same(case: Case, folder: Path, times: int) -> Seen:
    """Compare runs over sockets with a simulation on the same devices, and replay them."""
    outs = [folder / f"sockets_{n}" for n in range(times)]
    with ThreadPoolExecutor(times) as pool:  # side by side: most of their time is their start
        others = pool.map(partial(over_sockets, case), outs)
        whole = in_one_process(case, folder / "simulation")
        found = [_compared(whole, other) for other in others]
    seen = "; ".join(dict.fromkeys(text for text, _ in found))
    return f"{seen}, {times}x", all(ok for _, ok in found)


def _survives(case: Case, folder: Path) -> Seen:
    """Compare a run whose client and server were killed with one that was not disturbed."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(killed, case, folder / "killed")
        whole = in_one_process(case, folder / "simulation")
        return _compared(whole, other.result())


def _compared(whole: Path, other: Path) -> Seen:
    """Compare what two runs wrote, bit for bit, and replay the second."""
    found = compare(whole, other)
    seen = f"{found.tensors} tensors and {found.replayed} replayed gradients, {found.count} differ"
    fine = not found.count and found.tensors > 0 and found.replayed > 0
    return "; ".join([seen, *found.lines[:3]]), fine
