"""What a process computes with."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from sfl.config import NodeConfig
from sfl.environment import set_up_torch

set_up_torch(NodeConfig(device="cpu"))

def step():
    kept = [torch.zeros(750_000) for _ in range(8)]  # 24 MB

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("variable", ["", "MALLOC_TRIM_THRESHOLD_"])
def test_a_steps_memory_is_that_of_the_step_before(variable: str) -> None:
    environment = dict(os.environ) | ({variable: "131072"} if variable else {})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    num_pages = int(done.stdout)
    assert num_pages > 10_000 if variable else num_pages < 500  # of 4 KiB, for 240 MB
