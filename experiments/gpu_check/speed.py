"""How long a step takes beside a plain loop, in turns; memory of the device, and bytes copied."""

import contextlib
import gc
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from experiments.bench import rows as bench
from experiments.bench.contenders import BLOCK_ROUNDS, Contender, Peer, Sfl, mean_seconds
from experiments.bench.peers.alone import stepper
from experiments.bench.peers.task import Task
from experiments.gpu_check.made_images import COLOUR, GREY
from experiments.gpu_check.worker import Row, Seen
from sfl.config import RunConfig
from sfl.data.datasets import dataset_of
from sfl.nodes import SimulationNode
from sfl.options import parse_options
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel

BLOCKS, STEPS = 3, 24  # blocks that count, after one that does not; steps of a plain loop's block


@dataclass(frozen=True)
class Measurement:
    """One line of the table: a row of ``experiments.bench``, and where it is computed."""

    row: bench.Row
    device: str
    clients: str  # device of the clients

    @property
    def title(self) -> str:
        many = "one client" if self.row.clients == 1 else f"{self.row.clients} clients"
        where = f"all on {self.device}"
        if self.clients != self.device:
            where = f"server on {self.device}, clients on {self.clients}"
        return f"{self.row.model}, batch {self.row.batch_size}, {many}; {where}"

    def take(self, folder: Path, blocks: int, steps: int) -> Seen:
        """Return what was measured, as text; no figure is wrong."""
        folder.mkdir()
        ours_s, plain_s = self._in_turns(folder, blocks, steps)
        ratio = median(ours / plain for ours, plain in zip(ours_s, plain_s, strict=True))
        seen = f"{1e3 * median(ours_s):.2f} ms, plain loop {1e3 * median(plain_s):.2f} ms,"
        seen += f" ratio {ratio:.2f}; to the device {self._bytes()[0]:,} bytes a step,"
        seen += f" from it {self._bytes()[1]:,}"
        if torch.device(self.device).type != "cuda":
            return seen, True
        ours, plain = self._peak_bytes(folder)
        return f"{seen}; peak {ours / 2**20:,.0f} MiB, plain loop {plain / 2**20:,.0f} MiB", True

    def _in_turns(self, folder: Path, blocks: int, steps: int) -> tuple[list[float], list[float]]:
        """Return the seconds of a step in each block: over sockets, and of the plain loop."""
        rounds = (blocks + 1) * (BLOCK_ROUNDS + 1) + 3
        server = ["--rounds", str(rounds), "--keep-tensors", "none", "--keep-models", "last"]
        client = ["--allow-import", f"{GREY},{COLOUR}", "--device", self.clients]
        ours_s, plain_s = [], []
        with contextlib.ExitStack() as stack:
            with ThreadPoolExecutor(1) as pool:  # both start at the same time
                starting = pool.submit(Peer, stack, "plain loop", "alone", self.row, folder)
                ours = Sfl(stack, "SFL", self.row, folder, server, client)
                plain: Contender = starting.result()
            for block in range(blocks + 1):
                beside, found = plain.block(steps), ours.block(steps)
                if block:
                    plain_s.append(mean_seconds(beside))
                    ours_s.append(mean_seconds(found))
        return ours_s, plain_s

    def _bytes(self) -> tuple[int, int]:
        """Return the bytes that a client's step copies to the device and from it, by the shapes."""
        recipe, split = self._split()
        size = recipe.run.batch_size
        z, y = split.features_spec(size, 0).num_bytes, recipe.task.labels_spec(size).num_bytes
        x = size * 4 * int(torch.Size(split.input_shape).numel())
        both = self.clients == self.device
        return z + y + (x + z if both else 0), z + (z if both else 0)

    def _split(self) -> tuple[Recipe, SplitModel]:
        (run, _) = self._options()
        recipe, spec = Recipe.of(run), dataset_of(run)
        return recipe, SplitModel(recipe, spec.input_shape, len(spec.classes))

    def _options(self, *more: str) -> tuple[RunConfig, SimulationNode]:
        options = [*self.row.run_options(), *more]
        return parse_options(options, RunConfig, SimulationNode, prog="gpu_check", about="")

    def _peak_bytes(self, folder: Path) -> tuple[int, int]:
        """Return the peak of the device's memory: of both sides in one process, and of the loop."""
        own = ["--client-device", self.clients, "--rounds", "1", "--keep-tensors", "none"]
        run, node = self._options(*own, "--out", str(folder / "memory"))
        with _peak(self.device) as ours, contextlib.redirect_stdout(io.StringIO()):
            simulate(run, node)
        with _peak(self.device) as plain:
            step = stepper(Task("gpu_check", self.row.run_options()))
            for _ in range(3):
                step()
        return ours[0], plain[0]


@contextlib.contextmanager
def _peak(device: str) -> Iterator[list[int]]:
    """Append the peak of the device's memory in bytes that the ``with`` block has."""
    found: list[int] = []
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.append(torch.cuda.max_memory_allocated(device))


def measurements(device: str, folder: Path, *, is_dry: bool) -> Iterator[Row]:
    """Yield all measurements as rows of the table, the most wanted first."""
    blocks, steps = (1, 2) if is_dry else (BLOCKS, STEPS)
    for number, one in enumerate(sizes(device, is_dry=is_dry)):
        own = folder / f"speed_{number}"
        yield Row(one.title, partial(one.take, own, blocks, steps))


def sizes(device: str, *, is_dry: bool) -> list[Measurement]:
    """Return what is measured; a dry run has one small one."""

    def row(model: str, batch_size: int, clients: int, data: str, epochs: int) -> bench.Row:
        options = ("--dataset", data, "--device", device)
        return bench.Row(model, batch_size, clients, options, has_peers=False, epochs=epochs)

    if is_dry:
        return [Measurement(row("mlp", 512, 1, GREY, 1), device, "cpu")]
    models = [("lenet5", 128, GREY, 4), ("resnet18", 128, COLOUR, 4), ("resnet18", 32, COLOUR, 2)]
    found = [
        Measurement(row(model, batch_size, clients, data, epochs), device, device)
        for model, batch_size, data, epochs in models
        for clients in (1, 3)
    ]
    # The front of ResNet-18 takes a CPU long: a round has one pass over the data.
    own = [found[0].row, replace(found[-2].row, epochs=1)]
    apart = [Measurement(one, device, "cpu") for one in own]
    return [*found[0:5:2], *found[1:6:2], *apart]
