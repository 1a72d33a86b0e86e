"""What runs in the processes that Ray starts: the server, or many clients.

An exception is returned, not raised: Ray would wrap it, with its traceback as text.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from experiments.support.ray_cluster import Lines, take_command_line
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError, SflError, reason_of
from sfl.nodes import ClientNode, ServerNode
from sfl.runtime.hosting import host
from sfl.runtime.server import serve


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the processes of a run have in common."""

    token: str  # the secret of this run: whoever else reaches the port is turned away
    argv: Sequence[str]
    lines: Lines

    @contextlib.contextmanager
    def token_file(self) -> Iterator[str]:
        """Give this process its command line, and write the token into a file of its own."""
        take_command_line(self.argv)
        with tempfile.NamedTemporaryFile("w", prefix="sfl-token-") as file:  # its mode is 0600
            file.write(self.token)
            file.flush()
            yield file.name


class Process:
    """An actor: a process that Ray starts again if it has died; it then makes the call again."""

    def call(
        self, name: str, launch: Launch, function: Callable[..., Any], *arguments: Any
    ) -> SflError | None:
        """Return the error with which a function has ended, None if it is done."""
        if is_again():
            launch.lines.put(f"{name}: the process has died; Ray has started it again")
        try:
            function(launch, *arguments)
        except ConfigError as error:
            return ConfigError(str(error))
        except Exception as error:  # noqa: BLE001 - the process's edge
            return RunError(reason_of(error))
        return None


def serve_here(launch: Launch, run: RunConfig, node: ServerNode) -> None:
    """Be the server; a process that was started again goes on with the run."""
    folder = node.out_path / "server" / run.run
    if is_again() and not node.resume and (folder / "config.json").is_file():
        node = dataclasses.replace(node, resume=str(folder))
    with launch.token_file() as token_file, launch.lines.taken_from_stdout():
        serve(run, dataclasses.replace(node, token_file=token_file))


def host_here(launch: Launch, node: ClientNode) -> None:
    """Be the clients of this process; each goes on by itself where the server says."""
    with launch.token_file() as token_file:
        host(dataclasses.replace(node, token_file=token_file))


def is_again() -> bool:
    """Return whether Ray has started this process in place of one that had died."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
