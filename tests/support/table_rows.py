"""Rows for ``experiments.gpu_check.worker``, whose process imports this file and no torch."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.gpu_check.worker import Row, Seen
from sfl.errors import RunError


def rows_of_all_kinds(folder: str) -> Iterator[Row]:
    """Yield rows that are fine, wrong, fail, hang and die; ``folder`` is told what one starts."""

    def fails() -> Seen:
        raise RunError("it has failed")

    def hangs() -> Seen:
        with subprocess.Popen(["sleep", "600"]) as child:
            (Path(folder) / "child").write_text(str(child.pid))
            time.sleep(600)
        return "over", True

    def dies() -> Seen:
        os._exit(7)

    yield Row("fine", lambda: ("0 differ", True))
    yield Row("wrong", lambda: ("1 differ", False))
    yield Row("failed", fails)
    yield Row("hung", hangs)
    yield Row("died", dies)
    yield Row("fine again", lambda: ("0 differ", True))


def rows_that_end() -> Iterator[Row]:
    """Yield a row, and fail."""
    yield Row("late", lambda: ("0 differ", True))
    raise RunError("there is no GPU")
