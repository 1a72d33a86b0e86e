"""The decoder for a site's pages: made once by a process of its own, while the pages work already.

torch's number of threads is a process's: training beside the model's back would change its speed,
and even the last bit of its results.
"""

import contextlib
import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.web.decoder import STEPS, Made, make_decoder, shadow_images
from experiments.web.decoder_cache import made_once
from experiments.web.pages import JSON, ONNX, Answer, Route
from sfl.archive.run_folder import say
from sfl.errors import RunError, SflError, reason_of
from sfl.interactive.run import open_run
from sfl.nodes import NodeConfig
from sfl.options import from_values

END_WITHIN_S = 5.0
NONE, TRAINING, READY, FAILED = "none", "training", "ready", "failed"
_OF_MACHINE = ("data_dir", "cache_dir", "allow_import")
_EVERY = 5  # steps, between two reports


@dataclass(frozen=True)
class Order:
    """What is to be made: the decoder for a run's front, after so many steps (None: as usual)."""

    path: Path
    machine: Mapping[str, Any]
    client: int | None = None
    steps: int | None = None


class DecoderProcess:
    """Makes a decoder in the background. Ended by ``with``; safe to use from several threads."""

    def __init__(
        self, path: Path, node: NodeConfig, client: int | None = None, steps: int | None = None
    ) -> None:
        machine = {name: getattr(node, name) for name in _OF_MACHINE}
        self._order = Order(path, machine, client, steps)
        self._told: dict[str, Any] = {"state": TRAINING, "done": 0, "of": 0, "note": ""}
        self._data = b""
        self._lock, self._is_ending = threading.Lock(), threading.Event()
        context = multiprocessing.get_context("spawn")
        self._from_child, to_parent = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_make, args=(self._order, to_parent), name="decoder", daemon=True
        )
        self._to_parent: Connection = to_parent
        self._thread = threading.Thread(target=self._follow, name="decoder", daemon=True)

    @property
    def state(self) -> str:
        """``training``, ``ready`` or ``failed``."""
        with self._lock:
            return str(self._told["state"])

    def __enter__(self) -> "DecoderProcess":
        with _without_interrupts():
            self._process.start()
        self._to_parent.close()  # so that the child's end is seen
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_ending.set()
        self._process.terminate()
        self._process.join(END_WITHIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._thread.join(END_WITHIN_S)
        self._process.close()

    def routes(self) -> dict[str, Route]:
        """Return ``/decoder.json``, how far it is, and ``/decoder.onnx``."""
        return {"/decoder.json": self._progress, "/decoder.onnx": self._decoder}

    def _progress(self, given: Mapping[str, str]) -> Answer:
        with self._lock:
            return Answer(JSON, json.dumps(self._told).encode())

    def _decoder(self, given: Mapping[str, str]) -> Answer:
        with self._lock:
            if not self._data:
                told = self._told
                why = told["note"] or f"step {told['done']} of {told['of'] or 'some hundred'}"
                raise RunError(f"the decoder is not ready: {why}")
            return Answer(ONNX, self._data)

    def _follow(self) -> None:
        """Take what the process tells, and show it to who started the site."""
        showing = tqdm(desc="what an attacker sees", unit="step", leave=False, disable=None)
        with showing as bar, contextlib.suppress(EOFError, OSError):
            while self.state == TRAINING:
                told, data = self._from_child.recv()
                bar.total = told["of"] or None
                bar.update(told["done"] - bar.n)
                with self._lock:
                    self._told, self._data = told, data
        with self._lock:
            if self._told["state"] == TRAINING:
                why = "the process that makes it has ended"
                self._told = self._told | {"state": FAILED, "note": why}
            told = self._told
        self._from_child.close()
        if told["state"] == READY:
            say(f"what an attacker sees: ready, similarity {told['similarity']:.2f}")
        elif not self._is_ending.is_set():
            say(f"what an attacker sees: not shown: {told['note']}")


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that a Ctrl-C in the terminal does not reach: it would interrupt imports."""
    resource_tracker.ensure_running()  # else it starts now, and lets interrupts in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _make(order: Order, to_parent: Connection) -> None:
    """Make a decoder, in a process of its own."""
    table: dict[str, Any] = {"state": TRAINING, "done": 0, "of": 0, "note": ""}

    def tell(**more: Any) -> None:
        table.update(more)
        to_parent.send((table, b""))

    def progress(done: int, of: int) -> None:
        if done % _EVERY == 0 or done == of:
            tell(done=done, of=of)

    with contextlib.suppress(OSError), to_parent:  # the site is gone
        try:
            made = _made(order, progress)
        except Exception as error:  # noqa: BLE001 - the edge of the process
            kind = "" if isinstance(error, SflError) else "a fault: "
            tell(state=FAILED, note=f"{kind}{reason_of(error)}")
            return
        figures = {
            "similarity": made.similarity,
            "baseline": made.baseline,
            "num_shadow": made.num_shadow,
            "num_held_out": made.num_held_out,
        }
        to_parent.send((table | {"state": READY} | figures, made.data))


def _made(order: Order, progress: Callable[[int, int], None]) -> Made:
    """Return the decoder that was made before, or make it.

    Raises:
        SflError: it cannot be made.
    """
    run = open_run(order.path, threads=1, **order.machine)
    node, steps = from_values(NodeConfig, dict(order.machine), "the options"), order.steps or STEPS

    def make() -> Made:
        images = shadow_images(run, node)
        return make_decoder(run, images, client=order.client, steps=steps, on_progress=progress)

    return made_once(node.cache_path, run, order.client, steps, make)
