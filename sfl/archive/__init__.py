"""A run on disk: written in the background, read back, resumed from."""

from sfl.archive.reader import RunArchive, Step, open

__all__ = ["RunArchive", "Step", "open"]
