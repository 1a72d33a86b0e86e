"""All rows of the table, in the order in which they are done."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

from experiments.gpu_check.checks import checks
from experiments.gpu_check.speed import measurements
from experiments.gpu_check.worker import Row
from sfl.environment import describe, set_up_torch
from sfl.nodes import NodeConfig


def rows(device: str, folder: str) -> Iterator[Row]:
    """Yield all rows, in the process that does them."""
    is_dry, own = device == "cpu", Path(mkdtemp(dir=folder))
    about = describe(set_up_torch(NodeConfig(device=device)), [])
    named = ", ".join(f"{name} {value}" for name, value in about["fingerprint"].items())
    yield Row("this machine", lambda: (named, True))
    yield from checks(device, own, is_dry=is_dry)
    yield from measurements(device, own, is_dry=is_dry)
