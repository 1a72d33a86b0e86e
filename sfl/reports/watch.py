"""Watch a run from its folder, in a terminal."""

import contextlib
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sfl.reports.watch_state import FAILED, OVER, Watched, run_folder
from sfl.reports.watch_view import frame


def watch(name: str, out: Path, interval_s: float, *, once: bool) -> None:
    """Show a run until it ends; with ``once``, or where the output is no terminal, one picture.

    Ctrl-C ends the watching.

    Raises:
        RunError: there is no such run.
        IntegrityError: its ``status.json`` or ``rounds.csv`` is damaged.
    """
    console, run = Console(highlight=False), Watched(run_folder(name, out))
    if once or not console.is_terminal:
        console.print(frame(*run.look(), console))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            seen, silent_s = run.look()
            live.update(frame(seen, silent_s, console), refresh=True)
            if seen.state(silent_s) in (OVER, FAILED):
                return
            time.sleep(interval_s)
