"""What a page needs to know of a run: its model as JSON and ONNX files, and samples of its data."""

import json
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from experiments.web.feature_maps import map_shapes
from experiments.web.pages import INSTALL, JSON, ONNX, Answer, Route, has_runtime
from sfl import __version__
from sfl.archive.run_folder import say
from sfl.conversation.inference import described
from sfl.data.client_data import Source, load
from sfl.data.samples import Samples, nothing
from sfl.errors import ConfigError, DataError, counted, quoted, reason_of
from sfl.files.torch_file import TensorSpec, max_file_bytes
from sfl.interactive.run import Run
from sfl.model.portable import WHOLE
from sfl.model.topology import Holder, route
from sfl.nodes import ServerNode
from sfl.trained.export import back_checksum, export
from sfl.trained.inputs import expected_of


class ModelFiles:
    """A run for pages; each file is made once. Safe to use from several threads."""

    def __init__(
        self,
        run: Run,
        node: ServerNode,
        client: int | None = None,
        *,
        shares_samples: bool = True,
    ) -> None:
        """``client``: whose segments, where each client keeps its own.

        ``shares_samples``: whether pages may have test samples of the run's data set.

        Raises:
            ConfigError: a page cannot compute the front of such a run.
        """
        self.run, self.client, self._node = run, client, node
        self.shares_samples = shares_samples
        self._expected = expected_of(run)  # refuses parts of samples
        if not run.split.cuts:
            raise ConfigError(
                f"{run.path}: with --scheme {run.config.scheme} no server holds a part of the"
                " model: give a run with a cut, such as one of the demo"
            )
        if run.config.task != "classification":
            raise ConfigError(f"{run.path}: its --task is {run.config.task}: give a classifier's")
        self._holders = run.recipe.segments
        self._check_whose()
        self._lock = threading.Lock()
        self._made: dict[str, bytes] = {}

    def _check_whose(self) -> None:
        known = self.run.client_ids
        if self.client is not None and self.client not in known:
            raise ConfigError(
                f"--client {self.client}: the run has {counted(len(known), 'client')}"
            )
        for name in self.parts:
            self.run.segment(name, client=self._owner(name))  # or says what to give

    def _owner(self, part: str) -> int | None:
        return None if self._holders.get(part) is Holder.SERVER else self.client

    @property
    def parts(self) -> list[str]:
        """The names of the segments that a client holds."""
        return [name for name, holder in self._holders.items() if holder is Holder.CLIENT]

    def onnx(self, part: str) -> bytes:
        """Return the ONNX file of a client's segment, or of the whole model."""
        with self._lock:
            if part not in self._made:
                with tempfile.TemporaryDirectory(prefix="sfl-web-") as folder:
                    out = Path(folder) / "part.onnx"
                    done = export(self.run, "onnx", part, client=self._owner(part), out=out)
                    self._made[part] = done.path.read_bytes()
            return self._made[part]

    @cached_property
    def test_set(self) -> Samples:
        """The test samples that pages may have, before they are normalised; none if not here."""
        spec, node = self._expected.spec, self._node
        if not self.shares_samples:
            return nothing(spec.input_shape)
        try:
            if self.run.config.partition == "own":
                raise DataError("the clients' data are their own")
            source = Source(node.data_path, node.cache_path, spec.input_shape, say)
            return load(self.run.data_spec, source)[1].sized(spec.input_shape)
        except (DataError, OSError) as error:
            say(f"no samples to choose from: {reason_of(error)}")
            return nothing(spec.input_shape)

    @cached_property
    def _about(self) -> dict[str, Any]:
        run, config, known = self.run, self.run.config, self.run.normalisation
        segments = [
            {
                "name": name,
                "holder": holder.name.lower(),
                "file": f"model/{name}.onnx" if name in self.parts else "",
            }
            for name, holder in self._holders.items()
        ]
        sent = [stop.gives for stop in route(self._holders, Holder.CLIENT)]
        cuts = run.split.cuts
        shapes = [run.split.features_sample(link).shape for link in range(len(cuts))]
        maps = map_shapes(run.model(client=self.client), cuts, known.input_shape)
        return {
            "run": config.run,
            "round": run.last_round(),
            "rounds": config.rounds,
            "scheme": config.scheme,
            "model": config.model,
            "dataset": config.dataset,
            "cuts": list(cuts),
            "task": config.task,
            "input_shape": list(known.input_shape),
            "classes": list(known.classes),
            "mean": list(known.mean),
            "std": list(known.std),
            "seed": config.seed,
            "back_checksum": back_checksum(run),
            "sfl": __version__,
            "hello": described(run.split),
            "overhead_bytes": max_file_bytes([TensorSpec((0,), torch.float32)]),
            "features": [
                {"link": link, "shape": list(shape), "maps": maps[link], "sent": link in sent}
                for link, shape in enumerate(shapes)
            ],
            "segments": segments,
            "whole": "model/whole.onnx",
        }

    def about(self, more: Callable[[], Mapping[str, Any]]) -> Answer:
        """Return the run's description, with what changes."""
        changing = {
            "num_samples": len(self.test_set),
            "runtime": has_runtime(),
            "install": INSTALL,
        }
        return Answer(JSON, json.dumps(self._about | changing | dict(more())).encode())

    def sample(self, given: Mapping[str, str]) -> Answer:
        """Return a test sample of the data set: its label, and pixels as they are stored.

        Raises:
            ConfigError: there is no such sample.
        """
        index, count = given.get("index", ""), len(self.test_set)
        if not (index.isascii() and index.isdigit() and len(index) < 10 and int(index) < count):
            none = _NONE if self.shares_samples else _KEPT
            raise ConfigError(f"index={quoted(index)}: give 0 to {count - 1}" if count else none)
        one = self.test_set.take(torch.tensor([int(index)]))
        told = {
            "label": int(one.y[0]),
            "pixels": one.x[0].flatten().tolist(),
            "shape": list(one.sample_shape),
            "bytes": one.x.dtype == torch.uint8,  # 0 to 255; else numbers as they are
        }
        return Answer(JSON, json.dumps(told).encode())  # not kept: the address names no run

    def routes(self, more: Callable[[], Mapping[str, Any]] = dict) -> dict[str, Route]:
        """Return the routes of a run; ``more``: what other parts add to ``/model.json``."""

        def of_part(part: str) -> Route:
            return lambda given: Answer(ONNX, self.onnx(part))

        return {
            "/model.json": lambda given: self.about(more),
            "/sample": self.sample,
        } | {f"/model/{part}.onnx": of_part(part) for part in (*self.parts, WHOLE)}


_NONE = "the test samples of the run's data set are not on this machine: see --data-dir"
_KEPT = "the test samples of the run's data set stay on the site's machine: see --share-samples"
