"""Runs in one process."""

from collections.abc import Sequence
from pathlib import Path

from sfl.config import RunConfig
from sfl.nodes import NodeConfig
from sfl.options import from_values
from sfl.runtime.local_network import Away
from sfl.runtime.simulation import simulate
from tests.support.runs import BN_DROPOUT


def simulated(out: Path, **options: object) -> Path:
    """Run a simulation of small digits; return its folder."""
    defaults = {"rounds": 2, "run": "r", "keep_tensors": "none", "batch_size": 64}
    return simulate(RunConfig(**defaults | options), NodeConfig(out=str(out)))


def reference(folder: Path, run: dict[str, object], away: Sequence[Away] = ()) -> Path:
    """Return the server's folder of the same run in one process, undisturbed but for ``away``."""
    config = from_values(RunConfig, dict(run), "the test")
    return simulate(config, NodeConfig(out=str(folder)), away)


def recorded(out: Path, **options: object) -> Path:
    defaults = {"model": BN_DROPOUT, "cut": 5, "rounds": 3, "batch_size": 200, "clients": 2}
    return simulate(RunConfig(**defaults | options, run="r"), NodeConfig(out=str(out)))


CUT = 6  # BatchNorm and dropout on both sides
DEFAULTS = {"model": BN_DROPOUT, "cut": CUT, "rounds": 2, "batch_size": 200, "run": "r"}


def simulated_bn_dropout(out: Path, **options: object) -> Path:
    return simulate(RunConfig(**DEFAULTS | options), NodeConfig(out=str(out)))
