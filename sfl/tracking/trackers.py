"""``TRACKERS``: what ``--track`` names. A tracker is a class and a line here."""

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from sfl.errors import ConfigError
from sfl.registry import with_options
from sfl.tracking.long_table import LongTable
from sfl.tracking.tensorboard import TensorBoard
from sfl.tracking.tracked import Tracker
from sfl.tracking.weights_and_biases import WeightsAndBiases

TRACKERS: Mapping[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "csv": LongTable,
}


def trackers_of(text: str) -> Mapping[str, Tracker]:
    """Return the trackers that ``name[:option=value,...],...`` names.

    Raises:
        ConfigError: an unknown name or option, one named twice, or a package that is missing.
    """
    # A comma in front of option=value belongs to the tracker before it.
    texts: Sequence[str] = re.split(r",(?![^,:]*=)", text) if text else []
    trackers: dict[str, Tracker] = {}
    for one in texts:
        name = one.partition(":")[0]
        tracker = with_options("track", one, TRACKERS)()
        if name in trackers:
            raise ConfigError(f"--track {text}: {name} is named twice")
        if tracker.package and not importlib.util.find_spec(tracker.package):
            raise ConfigError(
                f"--track {one}: {tracker.package} is not installed; install it:"
                f" {sys.executable} -m pip install {tracker.package}"
            )
        if tracker.histograms < 0:
            raise ConfigError(f"--track {one}: histograms={tracker.histograms}: must be 0 or more")
        trackers[name] = tracker
    return trackers
