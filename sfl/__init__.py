"""SFL: split learning and SplitFed learning over real sockets."""

import importlib
import sys
from typing import Any

__version__ = "0.3.0"

# Before any import that fails to parse on an older Python, so that the user gets this line and no
# traceback.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        f"SFL needs Python 3.11 or later; {sys.executable} is Python"
        f" {sys.version_info[0]}.{sys.version_info[1]}. Make the environment with a newer one:"
        " python3.11 -m venv .venv"
    )

# What a Python session uses, and the module of each: imported when it is first asked for, since
# torch and pandas take seconds.
_LAZY = {
    "Run": "sfl.interactive.run",
    "RunConfig": "sfl.config",
    "export": "sfl.trained.export",
    "join": "sfl.interactive.processes",
    "open_run": "sfl.interactive.run",
    "plot": "sfl.interactive.run",
    "serve": "sfl.interactive.processes",
    "simulate": "sfl.interactive.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sfl' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
