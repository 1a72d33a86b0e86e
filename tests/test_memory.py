"""What a client may make a server hold, and a server a client: measured in real processes."""

import contextlib
from pathlib import Path

import pytest

from experiments.attacks import Claim, Insider, Target
from experiments.memory_attacks import (
    CLAIMS,
    GREEDY,
    SERVER,
    gradients_of,
    peak_bytes,
    try_claim,
    try_greed,
)
from sfl.errors import SflError
from sfl.protocol import Limits, MessageType
from tests.launch import Launcher
from tests.test_failures import wait_for

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)
RUN = ["--run", "r", "--peer-timeout", 4]


@pytest.mark.parametrize("name", GREEDY)
def test_a_client_that_takes_memory_gets_little(launcher: Launcher, name: str) -> None:
    greed = GREEDY[name]
    server = launcher.server(*greed.server, *RUN)
    wait_for(server, "listening")
    target, process = Target("127.0.0.1", launcher.port), server.process.pid
    assert process
    grown, answer = try_greed(target, process, greed)
    assert grown < greed.bound_bytes, answer
    wait_for(server, "client_0 is away")
    assert server.process.is_alive()
