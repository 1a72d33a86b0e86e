"""Run the user's ``--on-end`` command when a run has ended."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sfl.archive.run_folder import say

DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"  # values of SFL_OUTCOME


@contextlib.contextmanager
def running_at_end(command: str, run_dir: Path) -> Iterator[None]:
    """Run ``command`` in a shell after the ``with`` block, told the outcome and the run's folder.

    The outcome is that of the block, whatever becomes of the command.
    """
    outcome = FAILED
    try:
        yield
        outcome = DONE
    except KeyboardInterrupt:
        outcome = INTERRUPTED
        raise
    finally:
        if command and (problem := _problem(command, outcome, run_dir)):
            say(f"warning: --on-end: {problem}; the run itself is {outcome}")


def _problem(command: str, outcome: str, run_dir: Path) -> str:
    """Run the command; return what went wrong with it, "" if nothing did."""
    told = {"SFL_OUTCOME": outcome, "SFL_RUN_DIR": str(run_dir.resolve())}
    try:
        ended = subprocess.run(
            command, shell=True, check=False, stdin=subprocess.DEVNULL, env=os.environ | told
        )
    except (OSError, ValueError) as error:
        return f"cannot start the command: {error}"
    except KeyboardInterrupt:  # of the command: the run was over before
        return "the command was interrupted"
    return f"the command ended with exit code {ended.returncode}" if ended.returncode else ""
