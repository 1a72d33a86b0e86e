"""The programs, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.launch import OFFLINE

ROOT = Path(__file__).parent.parent.parent


def run_program(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``python COMMAND`` in the repository's root; check its exit code."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **OFFLINE},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done
