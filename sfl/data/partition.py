"""``PARTITIONS``: how training samples are divided among clients.

A partition is disjoint, covers the data, and depends only on the labels, the writers and the seed.
``vertical`` divides the columns: every client has all samples.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.samples import Samples
from sfl.errors import ConfigError, DataError
from sfl.registry import unknown_name

OWN = "own"  # each client's own data; nothing is divided
WRITER = "writer"
VERTICAL = "vertical"
MIN_SAMPLES = 10  # of every client after a Dirichlet draw, as in Li et al. 2022 (NIID-Bench)
MAX_DRAWS = 1000


def _shuffled(num_samples: int, run: RunConfig) -> Tensor:
    return torch.randperm(num_samples, generator=seeds.generator(run.seed, seeds.PARTITION))


def _iid(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Deal out parts of equal size."""
    return list(_shuffled(len(samples), run).tensor_split(run.clients))


def _sizes(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Deal out parts of the given shares."""
    return _cut(_shuffled(len(samples), run), _shares(argument, run.clients))


def _cut(order: Tensor, shares: list[float]) -> list[Tensor]:
    bounds = [round(len(order) * s) for s in itertools.accumulate(shares)]
    return list(order.tensor_split(bounds[:-1]))


def _shares(argument: str, num_clients: int) -> list[float]:
    try:
        shares = [float(share) for share in argument.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares):
        raise ConfigError(f"--partition sizes:{argument}: give a share above 0 for each client")
    if len(shares) != num_clients:
        raise ConfigError(
            f"--partition sizes:{argument} names {len(shares)} shares for {num_clients} clients"
        )
    if abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"--partition sizes:{argument}: the shares add up to {sum(shares):g}")
    return shares


def _dirichlet(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Deal out each class in shares drawn from a Dirichlet distribution.

    Yurochkin et al. 2019 (arXiv 1905.12022), Section 4: for each class, shares over the clients
    from Dir(alpha); the smaller alpha, the fewer classes a client has.
    """
    order = _shuffled(len(samples), run)
    classes = [order[samples.y[order] == label] for label in sorted(set(samples.y.tolist()))]

    def draw(drawn: np.random.Generator) -> list[Tensor]:
        alphas = np.full(run.clients, _alpha(argument, "dirichlet"))
        dealt = [_cut(of_class, drawn.dirichlet(alphas).tolist()) for of_class in classes]
        return [torch.cat(parts) for parts in zip(*dealt, strict=True)]

    return _draw_until_all_have_some(draw, run)


def _dirichlet_size(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Deal out parts whose sizes are drawn from a Dirichlet distribution; classes are not skewed.

    Li et al. 2022 (arXiv 2102.02079), Section 4.3, quantity skew.
    """
    order = _shuffled(len(samples), run)

    def draw(drawn: np.random.Generator) -> list[Tensor]:
        alphas = np.full(run.clients, _alpha(argument, "dirichlet-size"))
        return _cut(order, drawn.dirichlet(alphas).tolist())

    return _draw_until_all_have_some(draw, run)


def _alpha(argument: str, name: str) -> float:
    try:
        alpha = float(argument)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"--partition {name}:{argument}: give a number above 0, {name}:0.5")
    return alpha


def _draw_until_all_have_some(
    draw: Callable[[np.random.Generator], list[Tensor]], run: RunConfig
) -> list[Tensor]:
    """Draw until every client has enough samples to train and validate on."""
    for attempt in range(MAX_DRAWS):
        seed = seeds.derive(run.seed, seeds.PARTITION, attempt)
        parts = draw(np.random.default_rng(seed))
        if min(map(len, parts)) >= MIN_SAMPLES:
            return parts
    raise DataError(
        f"--partition {run.partition}: of {MAX_DRAWS} draws, none left each of {run.clients}"
        f" clients {MIN_SAMPLES} samples; give a larger alpha, or fewer clients"
    )


def _shards(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Sort by label, cut into shards, and deal each client the same number of them.

    McMahan et al. 2017, Section 3: with two shards, most clients have two classes.
    """
    count = run.clients * _num_shards(argument)
    if count > len(samples):
        raise DataError(
            f"--partition {run.partition}: {count} shards of {len(samples)} samples leave some"
            " empty"
        )
    order = _shuffled(len(samples), run)
    by_label = order[torch.sort(samples.y[order], stable=True).indices]
    shards = by_label.tensor_split(count)
    drawn = seeds.generator(run.seed, seeds.PARTITION, 0)
    dealt = torch.randperm(count, generator=drawn).reshape(run.clients, -1).tolist()
    return [torch.cat([shards[index] for index in own]) for own in dealt]


def _num_shards(argument: str) -> int:
    if not (argument.isascii() and argument.isdigit() and int(argument) > 0):
        raise ConfigError(f"--partition shards:{argument}: give a number of shards, shards:2")
    return int(argument)


def _writer(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Deal out whole writers, in equal numbers.

    Caldas et al. 2018 (arXiv 1812.01097): with as many clients as writers, one each.
    """
    writers = torch.unique(_writers(samples))
    if len(writers) < run.clients:
        raise DataError(
            f"--partition writer: {len(writers)} writers for {run.clients} clients leave some"
            " without data"
        )
    drawn = _shuffled(len(writers), run)
    groups = writers[drawn].tensor_split(run.clients)
    return [torch.isin(_writers(samples), group).nonzero().flatten() for group in groups]


def _writers(samples: Samples) -> Tensor:
    if samples.writers is None:
        raise DataError("--partition writer: the data set does not say who made its samples")
    return samples.writers


def _vertical(samples: Samples, run: RunConfig, argument: str) -> list[Tensor]:
    """Give all clients all samples; ``sfl.data.vertical`` leaves each its columns of them."""
    return [torch.arange(len(samples))] * run.clients


# (training samples, run, text after the colon) -> each client's indices
PARTITIONS: dict[str, Callable[[Samples, RunConfig, str], list[Tensor]]] = {
    "iid": _iid,
    "sizes": _sizes,
    "dirichlet": _dirichlet,
    "dirichlet-size": _dirichlet_size,
    "shards": _shards,
    WRITER: _writer,
    VERTICAL: _vertical,
}


def check_partition(run: RunConfig) -> None:
    """Raise ``ConfigError`` if the partition does not exist or does not fit the run."""
    name, colon, argument = run.partition.partition(":")
    if name not in {OWN, *PARTITIONS}:
        raise unknown_name("partition", run.partition, {OWN, *PARTITIONS})
    if name == "sizes":
        _shares(argument, run.clients)
    elif name in ("dirichlet", "dirichlet-size"):
        _alpha(argument, name)
    elif name == "shards":
        _num_shards(argument)
    elif colon:
        raise ConfigError(f"--partition {run.partition}: {name} takes nothing behind a colon")


def partition(samples: Samples, run: RunConfig) -> list[Tensor]:
    """Return the indices of each client's training samples.

    Raises:
        ConfigError: the partition's argument is wrong.
        DataError: the data do not allow it, or no draw gives every client enough samples.
    """
    name, _, argument = run.partition.partition(":")
    return PARTITIONS[name](samples, run, argument)


def deal(train: Samples, test: Samples, run: RunConfig) -> list[tuple[Samples, Samples]]:
    """Return each client's training and test samples.

    Test samples are dealt out in turn; with ``vertical`` each client has all; with ``writer``, they
    go to the client that has the writer, and writers without training samples are dealt out in
    turn.

    Raises:
        ConfigError, DataError: as ``partition``.
    """
    parts = [train.take(indices) for indices in partition(train, run)]
    if run.partition == VERTICAL:
        return [(part, test) for part in parts]
    if run.partition != WRITER:
        tests = [test.take(slice(k, None, run.clients)) for k in range(run.clients)]
        return list(zip(parts, tests, strict=True))
    writers = _writers(test)
    others = torch.unique(writers[~torch.isin(writers, _writers(train))])
    dealt = []
    for k, part in enumerate(parts):
        own = torch.cat([_writers(part), others[k :: run.clients]])
        dealt.append((part, test.take(torch.isin(writers, own).nonzero().flatten())))
    return dealt
