"""Files of one part of a trained model, as ``sfl-export --to torch`` writes them."""

from pathlib import Path

import sfl
from sfl.model.portable import About, Portable, write_portable


def write_part(run: sfl.Run, part: str, path: Path) -> Path:
    """Write one segment of a run's trained model."""
    config, known, cuts = run.config, run.normalisation, run.recipe.cuts
    about = About(
        part=part,
        model=config.model,
        cuts=cuts,
        task=config.task,
        input_shape=known.input_shape,
        takes=known.input_shape,
        mean=tuple(map(float, known.mean)),
        std=tuple(map(float, known.std)),
        classes=known.classes,
        run=config.run,
        seed=config.seed,
        sfl_version=sfl.__version__,
    )
    write_portable(path, Portable(run.segment(part).state_dict(), about))
    return path
