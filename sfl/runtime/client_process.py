"""What the clients of one process share: data, device, and access to the server."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sfl.config import RunConfig
from sfl.data.client_data import ClientData, DatasetSpec, Source, client_data, load
from sfl.data.datasets import dataset_of
from sfl.data.partition import OWN, deal
from sfl.data.private_data import load_own, num_images
from sfl.data.samples import Samples
from sfl.environment import Devices, set_up_devices
from sfl.errors import ConfigError
from sfl.nodes import ClientNode
from sfl.runtime.access import Access
from sfl.runtime.memory import client_bytes, sizes_of, why_too_large
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import MAX_EVALUATION_BATCH

Notify = Callable[[str], None]


def recipe_of(run: RunConfig, node: ClientNode, client: int) -> Recipe:
    """Return the recipe of a server's run, if this machine accepts it as this client.

    Raises:
        ConfigError: as ``Recipe.of``.
    """
    recipe = Recipe.of(run, node.allowed_imports)
    if not (node.keep_labels and recipe.has_labels(client)):
        return recipe
    return Recipe.of(run, node.allowed_imports, withholds_labels=True)


def devices_of(node: ClientNode) -> Devices:
    """Set up torch; return the devices of the process's clients, as ``set_up_devices``."""
    holder = f"--client-ids {node.client_ids}" if node.hosted else "a client without --client-ids"
    return set_up_devices(node, max(len(node.hosted), 1), holder)


@dataclass
class ClientProcess:
    """What the clients of one process share."""

    access: Access
    devices: Devices
    hosted: Sequence[int] = ()  # the clients, with --client-ids; empty: the process is one client
    _parts: dict[RunConfig, list[tuple[Samples, Samples]]] = field(default_factory=dict)

    @property
    def hosts_many(self) -> bool:
        return bool(self.hosted)

    def device_of(self, client: int) -> torch.device:
        """Return the device of one of the process's clients."""
        return self.devices.of(self.hosted.index(client) if self.hosted else 0)

    def load(self, recipe: Recipe, client: int, node: ClientNode, notify: Notify) -> ClientData:
        """Load a client's training, validation and test samples.

        Raises:
            ConfigError, DataError: the data set is unknown, not allowed, or missing.
        """
        run = recipe.run
        spec = dataset_of(run, node.allowed_imports)
        own = node.data_path / f"client_{client}" if self.hosts_many else node.data_path
        self._check_memory(recipe, spec, node, own, client)
        if run.partition == OWN:
            return load_own(
                spec, run, client, own,
                say=notify, has_ids=recipe.aligns, columns=recipe.tasks.columns,
            )  # fmt: skip
        if run not in self._parts:
            source = Source(node.data_path, node.cache_path, spec.input_shape, notify)
            self._parts[run] = deal(*load(spec, source), run)
        return client_data(spec, run, client, *self._parts[run][client])

    def _check_memory(
        self, recipe: Recipe, spec: DatasetSpec, node: ClientNode, own: Path, client: int
    ) -> None:
        """Check the memory that the server's options would take against ``--memory-limit``.

        Raises:
            ConfigError: it is more.
        """
        run, shape, hosted = recipe.run, spec.input_shape, max(len(self.hosted), 1)
        sizes = sizes_of(recipe, shape, len(spec.classes), client)
        known, decoded = spec.num_samples, spec.num_samples if spec.decodes else 0
        if run.partition == OWN:
            known = decoded = num_images(own)  # 0 for an .npz
        most = known or max(run.batch_size + 1, MAX_EVALUATION_BATCH)
        needed = client_bytes(run.batch_size, sizes, most_samples=most, hosted=hosted)
        needed["images"] = decoded * math.prod(shape)
        named = f"--model {run.model}, --image-size {run.image_size}, --batch-size {run.batch_size}"
        if why := why_too_large(needed, node, f"the server's {named}"):
            raise ConfigError(why)
