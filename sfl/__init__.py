"""SFL: split learning and SplitFed learning over real sockets."""

import sys

__version__ = "0.3.0"

# Before any import that fails to parse on an older Python, so that the user gets this line and no
# traceback.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        f"SFL needs Python 3.11 or later; {sys.executable} is Python"
        f" {sys.version_info[0]}.{sys.version_info[1]}. Make the environment with a newer one:"
        " python3.11 -m venv .venv"
    )
