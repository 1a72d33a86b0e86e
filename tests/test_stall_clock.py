"""A round waits for progress, not for signs of life: over real sockets."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

import sfl.runtime.lobby
from experiments.hostile.insiders import Insider, write_bystander
from experiments.hostile.target import Target
from sfl.cli import main_server
from sfl.errors import SflError
from sfl.files.torch_file import encode
from sfl.transport.heartbeat import Heartbeat
from sfl.wire.framing import encode_head
from sfl.wire.messages import Message, MessageType
from tests.support import poison
from tests.support.launch import Launcher, wait_for

LIMIT_S = 2
SKIP = ["--on-missing", "skip", "--round-timeout", LIMIT_S]
SLOW = "tests.support.models:slow"
Harm = Callable[[Insider], Iterator[None]]


def only_lives(insider: Insider) -> Iterator[None]:
    """Send signs of life alone, that name a later step every second; it has sixteen."""
    for tenth in range(100):
        insider.link.at = insider.at(tenth // 10)
        yield


def byte_by_byte(insider: Insider) -> Iterator[None]:
    """Send a file as slowly as can be."""
    import torch

    data = encode(torch.zeros(4, dtype=torch.int64))
    message = Message(MessageType.TRAINING_LABELS, at=insider.at(0), payload=data)
    frame = encode_head(message) + data
    insider.link._stream.send([memoryview(frame[:-500])])
    for byte in frame[-500:-1]:
        insider.link._stream.send([memoryview(bytes([byte]))])
        yield


@pytest.mark.slow
@pytest.mark.parametrize("harm", [only_lives, byte_by_byte])
def test_a_client_that_makes_no_progress_does_not_hold_the_round(
    launcher: Launcher, harm: Harm
) -> None:
    run = ["--model", "mlp", "--partition", "own", "--batch-size", 4, "--clients", 2]
    server = launcher.server(*run, "--rounds", 2, "--run", "r", *SKIP)
    wait_for(server, "listening")
    data = write_bystander(launcher.folder / "bystander")
    honest = launcher.client("--client-id", 1, "--data-dir", data)
    with Target("127.0.0.1", launcher.port).reach() as stream:
        insider = Insider(stream)
        insider.begin()
        beats = (
            Heartbeat(lambda: [insider.link]) if harm is only_lives else contextlib.nullcontext()
        )
        with beats, contextlib.suppress(SflError, OSError):
            insider.link.heartbeat_s = 0.2
            for _ in harm(insider):
                if "going on without client_0" in server.out:
                    break
                assert server.process.is_alive(), server.err
                time.sleep(0.1)  # how slowly it sends
    assert "client_0 made no progress for" in server.out
    for program in (server, honest):
        program.ended_with(0)


@pytest.mark.slow
def test_a_client_that_only_comes_back_does_not_hold_the_round(launcher: Launcher) -> None:
    run = ["--model", "mlp", "--partition", "own", "--batch-size", 4, "--clients", 2]
    server = launcher.server(*run, "--rounds", 2, "--run", "r", *SKIP)
    wait_for(server, "listening")
    data = write_bystander(launcher.folder / "bystander")
    honest = launcher.client("--client-id", 1, "--data-dir", data)
    target = Target("127.0.0.1", launcher.port)
    for _ in range(60):
        with contextlib.suppress(SflError, OSError), target.reach() as stream:
            Insider(stream)
            time.sleep(0.2)  # how long it stays
        if "going on without client_0" in server.out:
            break
    assert "going on without client_0" in server.out
    for program in (server, honest):
        program.ended_with(0)


def hurried(argv: Sequence[str] | None = None) -> int:
    """Run ``run_server.py``, which waits at the end of a run for a second."""
    sfl.runtime.lobby.LINGER_S = 1.0  # type: ignore[attr-defined]
    return main_server(argv)


@pytest.mark.slow
def test_a_client_that_takes_no_leave_does_not_hold_the_end(launcher: Launcher) -> None:
    run = ["--model", "mlp", "--batch-size", 200, "--clients", 2, "--rounds", 1, "--run", "r"]
    argv = ["--port", launcher.port, "--out", launcher.folder, *run]
    server = launcher.start("server", hurried, argv)
    honest = launcher.client("--client-id", 0)
    own = ["--server", f"127.0.0.1:{launcher.port}", "--out", launcher.folder, "--client-id", 1]
    stays = launcher.start("client", poison.main_staying, own)
    for program in (server, honest):
        program.ended_with(0)
    assert "client_1 is away: client_1 made no progress for 1 seconds" in server.out
    assert stays.process.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fl", "sl"])
def test_whoever_makes_progress_is_waited_for(launcher: Launcher, scheme: str) -> None:
    """Each part of a round takes longer than the limit, no step of it does."""
    run = ["--model", SLOW, "--cut", 1, "--batch-size", 400, "--clients", 2, "--rounds", 2]
    server = launcher.server(*run, "--scheme", scheme, *SKIP)
    allow = ["--allow-import", SLOW]
    clients = [launcher.client("--client-id", k, *allow) for k in range(2)]
    for program in (server, *clients):
        program.ended_with(0)
    assert "going on without" not in server.out
