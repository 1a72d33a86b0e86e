"""Whether a model can be trained in its segments: tried before the start, on a few samples.

What only shows in a run is found here: what depends on the batch's size or on training mode, what a
block keeps between calls, what passes a cut by another way than the tensor that is sent.
"""

from collections.abc import Callable

from sfl.errors import ConfigError, SflError, told
from sfl.model.trial import Made, Trial
from sfl.strategy.split_model import SplitModel

# Two are the fewest that BatchNorm trains on; three find what fits only pairs.
NUM_SAMPLES, MORE_SAMPLES = 2, 3
Pass = Callable[[Trial], list[Made]]
_PASSES: tuple[Pass, ...] = (lambda t: t.evaluate(1)[1], lambda t: t.train(MORE_SAMPLES))


def check_model(split: SplitModel) -> None:
    """Let copies of a model's segments train and evaluate batches of several sizes.

    Raises:
        ConfigError: they cannot, or they would compute something else than the model as a whole.
    """
    try:
        _check(split)
    except (SflError, OSError, MemoryError):
        raise
    except Exception as error:  # what copies, moves and loads the blocks of a user's own
        raise ConfigError(f"the model cannot be tried on a few samples: {told(error)}") from error


def _check(split: SplitModel) -> None:
    used = split.trial()
    used.train(NUM_SAMPLES, backward=True)
    used.evaluate(NUM_SAMPLES)
    for make in _PASSES:
        wanted = make(split.trial(whole=True))
        found, problem = _try(make, used)
        if found != wanted:
            raise ConfigError(_why(split, make, wanted, problem or _first(wanted, found)))


def needs_several_samples(split: SplitModel) -> str | None:
    """Return why a model cannot be trained on one sample, which names the block; None: it can."""
    try:
        split.trial().train(1)
    except ConfigError as error:
        return str(error)
    return None


def _try(make: Pass, trial: Trial) -> tuple[list[Made], str]:
    """Return what the blocks make in a pass, or why it fails."""
    try:
        return make(trial), ""
    except ConfigError as error:
        return [], str(error)


def _first(wanted: list[Made], found: list[Made]) -> str:
    """Return what to say of the first block that makes something else."""
    title = next(w.title for w, f in zip(wanted, found, strict=True) if w != f)
    return f"{title} gives something else for the same batch"


def _why(split: SplitModel, make: Pass, wanted: list[Made], problem: str) -> str:
    """Return why segments that have been used differ from the fresh model as a whole."""
    found, problem_of_fresh = _try(make, split.trial())
    if found == wanted:
        return (
            f"{problem} after other batches: a block keeps something between calls that is no"
            " buffer, and that no other machine has; each call has to begin anew"
        )
    problem = problem_of_fresh or f"{_first(wanted, found)} than in the model as a whole"
    return (
        f"{problem}: something passes the cut beside the tensor that is sent; put what belongs"
        " together (a residual, with all that it goes around) into one block"
        f"{split.where_to_cut()}"
    )
