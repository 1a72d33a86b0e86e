"""A check before the start: train and evaluate the model's segments on a few samples.

It finds models that would fail, or compute something else, only during a run: by the size of a
batch or training mode, by state that a block keeps between calls, or by tensors that pass the cut
other than as the tensor that is sent.
"""

import re
from collections.abc import Callable, Mapping

import torch

from sfl.environment import deterministic_alone
from sfl.errors import ConfigError, SflError, told
from sfl.model.topology import Holder
from sfl.model.trial import BlockOutput, Trial
from sfl.strategy.split_model import SplitModel

# BatchNorm needs two samples to train; three reveal code that only works for pairs.
NUM_SAMPLES, MORE_SAMPLES = 2, 3
# torch's message behind a block's title: "put_ does not have a deterministic implementation, ..."
_NO_FORM = re.compile(
    r"(.*?)(?: cannot train on a batch of \d+| fail): "
    r"(?:\w+: )?(\S+) does not have a deterministic "
)
Pass = Callable[[Trial], list[BlockOutput]]
_PASSES: tuple[Pass, ...] = (lambda t: t.evaluate(1)[1], lambda t: t.train(MORE_SAMPLES))


def check_model(split: SplitModel) -> None:
    """Check that copies of the segments can train and evaluate batches of several sizes.

    Raises:
        ConfigError: they cannot, or their results differ from those of the whole model.
    """
    try:
        _check(split)
    except (SflError, OSError, MemoryError):
        raise
    except Exception as error:  # from copying or loading a user's own blocks
        raise ConfigError(f"the model cannot be tried on a few samples: {told(error)}") from error


def _check(split: SplitModel) -> None:
    if split.recipe.run.batch_size == 1 and (why := needs_several_samples(split)):
        raise ConfigError(f"--batch-size 1: give at least 2: {why}")
    used = split.trial()
    used.train(NUM_SAMPLES, backward=True)
    used.evaluate(NUM_SAMPLES)
    for make in _PASSES:
        wanted = make(split.trial(whole=True))
        found, problem = _run(make, used)
        if found != wanted:
            raise ConfigError(
                _explain(split, make, wanted, problem or _first_difference(wanted, found))
            )


def needs_several_samples(split: SplitModel) -> str | None:
    """Return why a model cannot train on one sample, naming the block; None if it can."""
    try:
        split.trial().train(1)
    except ConfigError as error:
        return str(error)
    return None


def unordered(split: SplitModel, devices: Mapping[Holder, torch.device]) -> str:
    """Return which block some GPU computes in another order each time; "" if there is none.

    ``devices``: of the parties that compute here. Nothing is tried where all of them are CPUs.
    """
    has_gpu = any(device.type == "cuda" for device in devices.values())
    return try_in_order(split, devices) if has_gpu else ""


def try_in_order(split: SplitModel, devices: Mapping[Holder, torch.device]) -> str:
    """Train on a few samples, where operations without a deterministic form raise an error.

    Return which block the first of them is in; "" if there is none.

    Raises:
        ConfigError: the model cannot be tried on these devices.
    """
    try:
        with deterministic_alone():
            split.trial(devices=devices).train(MORE_SAMPLES, backward=True)
    except ConfigError as error:
        if found := _NO_FORM.search(str(error)):
            where, operation = found.groups()
            return (
                f"{where}: {operation} has no deterministic form on this device, so that the last"
                " bit may differ when the run goes on after a failure, or is replayed"
            )
        raise
    return ""


def _run(make: Pass, trial: Trial) -> tuple[list[BlockOutput], str]:
    """Return the blocks' outputs in a pass, or why it fails."""
    try:
        return make(trial), ""
    except ConfigError as error:
        return [], str(error)


def _first_difference(wanted: list[BlockOutput], found: list[BlockOutput]) -> str:
    """Return a message about the first block whose output differs."""
    title = next(w.title for w, f in zip(wanted, found, strict=True) if w != f)
    return f"{title} gives something else for the same batch"


def _explain(split: SplitModel, make: Pass, wanted: list[BlockOutput], problem: str) -> str:
    """Return why used segments differ from the fresh whole model."""
    found, problem_of_fresh = _run(make, split.trial())
    if found == wanted:
        return (
            f"{problem} after other batches: a block keeps something between calls that is no"
            " buffer, and that no other machine has; each call has to begin anew"
        )
    problem = problem_of_fresh or f"{_first_difference(wanted, found)} than in the model as a whole"
    return (
        f"{problem}: something passes the cut beside the tensor that is sent; put what belongs"
        " together (a residual, with all that it goes around) into one block"
        f"{split.where_to_cut()}"
    )
