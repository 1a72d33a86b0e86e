"""Vertically partitioned data: clients have different columns of the same samples.

``--partition vertical`` gives client k a strip of each image, or a group of a table's columns. With
``own`` data the samples have ids; what all clients have is found by them, see ``align``. One client
has the labels.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.samples import Samples
from sfl.errors import ConfigError, DataError

Ids = Mapping[str, Tensor]  # of the samples of each part: (N, 2) int64, see ``digests``


def columns_of(width: int, num_clients: int, client: int) -> slice:
    """Return a client's columns: neighbours, as many as the others have, or one more.

    Raises:
        ConfigError: there are fewer columns than clients.
    """
    if width < num_clients:
        raise ConfigError(
            f"--partition vertical: {width} columns for {num_clients} clients leave some without"
        )
    own = np.array_split(np.arange(width), num_clients)[client]
    return slice(int(own[0]), int(own[-1]) + 1)


def strip_of(shape: Sequence[int], run: RunConfig, client: int) -> tuple[int, ...]:
    """Return the shape of a client's part of a sample."""
    own = columns_of(shape[-1], run.clients, client)
    return (*shape[:-1], own.stop - own.start)


def strip(samples: Samples, run: RunConfig, client: int) -> Samples:
    """Return a client's columns of samples; without the labels, unless they are this client's."""
    y = samples.y if client == run.label_client else torch.zeros_like(samples.y)
    columns = columns_of(samples.sample_shape[-1], run.clients, client)
    return dataclasses.replace(samples, y=y, columns=columns)


def digests(ids: Sequence[str]) -> Tensor:
    """Return 128 bits of the SHA-256 of each id: (N, 2) int64.

    It hides no id from who can guess it: ids are compared, not protected.

    Raises:
        DataError: an id occurs twice.
    """
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"ids: {twice!r:.60} occurs more than once")
    hashed = b"".join(hashlib.sha256(name.encode()).digest()[:16] for name in ids)
    return torch.from_numpy(np.frombuffer(hashed, "<i8").reshape(-1, 2).copy())


def align(ids: Mapping[int, Ids], seed: int) -> dict[str, Tensor]:
    """Return the ids that all clients have, by part, in an order drawn from the seed.

    Raises:
        DataError: there are none for training.
    """
    found = {}
    for index, part in enumerate(next(iter(ids.values()))):
        sets = [set(map(tuple, own[part].tolist())) for own in ids.values()]
        shared = sorted(set.intersection(*sets))
        drawn = seeds.generator(seed, seeds.ALIGNMENT, index)
        order = torch.randperm(len(shared), generator=drawn)
        found[part] = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2)[order]
    if not len(found["train"]):
        counts = ", ".join(f"client_{k} {len(own['train'])}" for k, own in sorted(ids.items()))
        raise DataError(
            f"no training sample has the same id at all clients ({counts}): the arrays ids of their"
            " files must name the samples alike"
        )
    return found


def rows_of(wanted: Tensor, own: Tensor) -> Tensor:
    """Return the rows of a client's samples that have the wanted ids, in their order: (N,) int64.

    Raises:
        DataError: the client has no sample of an id.
    """
    place = {id_: row for row, id_ in enumerate(map(tuple, own.tolist()))}
    rows = [place.get(id_, -1) for id_ in map(tuple, wanted.tolist())]
    if -1 in rows:
        raise DataError("the run has ids of samples that are not here: the data have changed")
    return torch.tensor(rows, dtype=torch.int64)
