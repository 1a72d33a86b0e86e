"""The two programs, and how every program of the project ends.

Exit codes: 0 done; 1 the run failed; 2 bad options; 3 told to stop, by Ctrl-C or SIGTERM: the run
can go on. Whatever goes wrong is one line on standard error; ``SFL_TRACEBACK=1`` shows the
traceback as well, for whoever looks for a bug.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from sfl.errors import ConfigError, reason_of
from sfl.link import one_line

INTERRUPTED = 3  # exit code


def main_server(argv: Sequence[str] | None = None) -> int:
    """Run ``run_server.py`` and return its exit code."""

    def program() -> None:
        from sfl.config import RunConfig, ServerNode
        from sfl.fed_server import serve_fed
        from sfl.options import parse_options
        from sfl.server import serve

        about = "Start the server of a split-learning run; the clients are run_client.py."
        run, node = parse_options(argv, RunConfig, ServerNode, prog="run_server.py", about=about)
        (serve_fed if node.role == "fed" else serve)(run, node)

    return run_program("run_server.py", program)


def main_client(argv: Sequence[str] | None = None) -> int:
    """Run ``run_client.py`` and return its exit code."""

    def program() -> int:
        from sfl.client import take_part
        from sfl.client_check import check
        from sfl.config import ClientNode
        from sfl.host import host
        from sfl.options import parse_options

        about = (
            "Take part in a split-learning run; everything about training comes from the server."
        )
        (node,) = parse_options(argv, ClientNode, prog="run_client.py", about=about)
        if node.check_:
            return check(node)
        (host if node.client_ids else take_part)(node)
        return 0

    return run_program("run_client.py", program)


def run_program(name: str, program: Callable[[], int | None]) -> int:
    """Run a program and return its exit code, with one line on standard error if it fails.

    SIGTERM ends it as Ctrl-C does: peers are told, what is under way is written. A second one ends
    it at once. Modules are imported inside ``program``, so that neither shows a traceback while
    torch is being imported.
    """
    told = False

    def interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
        nonlocal told
        if told:
            os.write(2, f"{name}: error: interrupted twice\n".encode())
            os._exit(INTERRUPTED)
        told = True
        raise KeyboardInterrupt

    # A shell lets what it starts in the background ignore Ctrl-C.
    numbers = (signal.SIGINT, signal.SIGTERM)
    caught = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, interrupt)
    try:
        return program() or 0
    except ConfigError as error:
        return _fail(name, error, 2)
    except KeyboardInterrupt as error:
        return _fail(name, error, INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the process's edge
        return _fail(name, error, 1)
    finally:  # all is over: a signal that comes now says nothing new
        for number in caught:
            signal.signal(number, signal.SIG_IGN)


def _fail(name: str, error: BaseException, code: int) -> int:
    if os.environ.get("SFL_TRACEBACK"):
        traceback.print_exception(error)
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else reason_of(error)
    sys.stderr.write(f"{name}: error: {one_line(reason, 2000)}\n")
    return code
