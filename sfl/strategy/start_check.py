"""A check before the start: train and evaluate the model's segments on a few samples.

It finds models that would fail, or compute something else, only during a run: by the size of a
batch or training mode, by state that a block keeps between calls, or by tensors that pass the cut
other than as the tensor that is sent.
"""

from collections.abc import Callable

from sfl.errors import ConfigError, SflError, told
from sfl.model.trial import BlockOutput, Trial
from sfl.strategy.split_model import SplitModel

# BatchNorm needs two samples to train; three reveal code that only works for pairs.
NUM_SAMPLES, MORE_SAMPLES = 2, 3
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
