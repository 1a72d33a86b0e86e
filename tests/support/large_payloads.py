"""A model whose import lets every payload go onto disk, and each program say so in its folder."""

from pathlib import Path

from sfl.wire import payload
from tests.support.models import bn_dropout

__all__ = ["bn_dropout"]
MARK = "went_onto_disk"


class Marking(payload.OnDisk):
    def __init__(self, num_bytes: int, folder: Path) -> None:
        super().__init__(num_bytes, folder)
        (folder / MARK).touch()


payload.LARGE_BYTES = 1
payload.OnDisk = Marking  # type: ignore[misc]
