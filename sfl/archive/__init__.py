"""A run on disk: written off the critical path, read back, gone on from."""

from sfl.archive.reader import RunArchive, Step, open

__all__ = ["RunArchive", "Step", "open"]
