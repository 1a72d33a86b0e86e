"""Studies: programs, ``python -m experiments.NAME``, and what several of them share (``support``).

docs/programs.md has a table of the programs. A program is a module or the ``__main__`` of a
package: it parses its options, calls the modules that do the work, and prints.

Imports stand at the top of a module. The exception is a program's ``main``: what needs torch or
another library is imported there, once the options are parsed. So ``--help`` is quick, and
``sfl.program.run_program`` says in one line which package is missing.
"""

import re
import sys
from pathlib import Path

import sfl  # noqa: F401 - says so if this Python is too old


def _check_is_program() -> None:
    """See that what ``python -m`` is about to run is a program, which would else do nothing."""
    named = [re.match(r"(?:-\w*m)?experiments\.([\w.]+)$", argument) for argument in sys.orig_argv]
    name = next((found.group(1) for found in named if found), "")
    path = Path(__file__).parent / (name.replace(".", "/") + ".py")
    if path.is_file() and "__main__" not in path.read_text(encoding="utf-8"):
        raise SystemExit(
            f"experiments.{name} is no program; docs/programs.md has a table of those there are"
        )


if sys.argv[:1] == ["-m"]:  # so it is until the module has been found
    _check_is_program()
