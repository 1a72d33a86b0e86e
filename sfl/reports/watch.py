"""Watch a run from its folder, in a terminal."""

import contextlib
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sfl.errors import RunError
from sfl.reports.watch_state import FAILED, OVER, Watched, run_folder
from sfl.reports.watch_view import frame
from sfl.wire.link import one_line

BEGINS_WITHIN_S = 60.0  # a run that is named and not there yet


def watch(name: str, out: Path, interval_s: float, *, once: bool) -> None:
    """Show a run until it ends; with ``once``, or where the output is no terminal, one picture.

    Ctrl-C ends the watching.

    Raises:
        RunError: there is no such run.
        IntegrityError: its ``status.json`` or ``rounds.csv`` is damaged.
    """
    console = Console(highlight=False)
    if once or not console.is_terminal:
        console.print(frame(*Watched(run_folder(name, out)).look(), console))
        return
    run = Watched(begun(name, out, console))
    if not name and run.look()[0].state(0.0) == OVER:
        console.print("the newest run is over; one that begins is waited for by its name")
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            seen, silent_s = run.look()
            live.update(frame(seen, silent_s, console), refresh=True)
            if seen.state(silent_s) in (OVER, FAILED):
                return
            time.sleep(interval_s)


def begun(name: str, out: Path, console: Console) -> Path:
    """Return a run's folder; a run that is named may begin in a moment.

    Raises:
        RunError: there is no such run, for a minute if it is named.
    """
    until, has_told = time.monotonic() + BEGINS_WITHIN_S, False
    while True:
        try:
            return run_folder(name, out)
        except RunError:
            if not name or time.monotonic() > until:
                raise
        if not has_told:
            console.print(Text(f"waiting for the run {one_line(name)} to begin"))
            has_told = True
        time.sleep(0.5)
