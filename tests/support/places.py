"""Places for weights, as tests open them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sfl.values import Position
from sfl.weights.bucket import Bucket
from sfl.weights.exchange import WeightKey
from sfl.weights.object_store import Directory
from sfl.wire.messages import Limits, MessageType
from tests.support.emulator import BUCKET

LIMITS = Limits(
    payload_bytes=dict.fromkeys((MessageType.SEND_MODEL, MessageType.SEND_AGGREGATED_MODEL), 10**6)
)
PREFIX = f"gs://{BUCKET}/weights"
DATA = os.urandom(300_000)


@dataclass
class Said:
    """What a store said to people."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def bucket(tmp_path: Path, timeout_s: float = 20.0, say: Said | None = None) -> Bucket:
    address = f"{PREFIX}/{tmp_path.name}"
    return Bucket(address, tmp_path / "scratch", timeout_s=timeout_s, say=say or Said())


def directory(tmp_path: Path) -> Directory:
    return Directory(str(tmp_path / "shared"))


def key(name: str = "client_1", round_index: int = 3, run: str = "r") -> WeightKey:
    return WeightKey(name, Position(run, round_index, -1, 1))
