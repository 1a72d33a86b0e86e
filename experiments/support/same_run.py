"""Whether two runs of one configuration gave the same: weights, recorded steps, figures."""

import io
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sfl.archive.manifest import read_manifest
from sfl.archive.reader import RunArchive
from sfl.archive.round_log import read_round, read_summary
from sfl.errors import IntegrityError
from sfl.runtime.recorded_run import RecordedRun, load
from sfl.runtime.replay import check

# Of what a round's file says, what depends on neither time nor on what was sent twice.
FIGURES = ("loss", "acc", "samples", "val_", "test_")


@dataclass
class Differences:
    """What was compared, and what differs."""

    tensors: int = 0
    replayed: int = 0  # gradients of the second run
    count: int = 0  # of tensors, steps and figures that differ, or are there once
    lines: list[str] = field(default_factory=list)

    def add(self, line: str, count: int = 1) -> None:
        self.count += count
        self.lines.append(line)


def compare(whole: Path, other: Path) -> Differences:
    """Compare everything that the parties of two runs wrote, and replay the second.

    ``whole``, ``other``: the folders of the main server; those of others lie beside them.
    """
    found = Differences()
    _compare_files(_client_folder(whole), _client_folder(other), found)
    ours, theirs = load(whole), load(other)
    found.replayed = _compare_party(ours, theirs, found)
    for role in ours.recipe.followers:
        party = load(_follower_folder(whole, role)), load(_follower_folder(other, role))
        _compare_party(*party, found)
    return found


def _compare_party(ours: RecordedRun, theirs: RecordedRun, found: Differences) -> int:
    """Compare what a server or hop wrote in two runs; replay the second, return its gradients."""
    whole, other = ours.archive.root, theirs.archive.root
    _compare_files(whole, other, found)
    try:
        _compare_steps(ours.archive, theirs.archive, found)
        _compare_figures(ours, theirs, found)
    except IntegrityError as error:
        found.add(str(error))
    report = check(theirs)
    for finding in report.findings:
        found.add(f"replay of {other}: {finding}")
    return report.checked


def _follower_folder(server_folder: Path, role: str) -> Path:
    return server_folder.parent.parent / role.replace(":", "_") / server_folder.name


def _client_folder(server_folder: Path) -> Path:
    return server_folder.parent.parent / "client" / server_folder.name


def _compare_files(whole: Path, other: Path, found: Differences) -> None:
    """Compare the files of weights below two folders."""
    names = {p.relative_to(f) for f in (whole, other) for p in f.rglob("models/*.pt")}
    for name in sorted(names):
        data = [(f / name).read_bytes() if (f / name).exists() else b"" for f in (whole, other)]
        count = max(map(_count_tensors, data))
        found.tensors += count
        if data[0] != data[1]:
            found.add(f"{other / name}: differs", count)


def _count_tensors(data: bytes) -> int:
    """Return how many tensors a ``torch.save`` file holds: each is a record of its container."""
    if not data:
        return 1
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as container:
            return sum("/data/" in name for name in container.namelist())
    except zipfile.BadZipFile:
        return 1


def _compare_steps(ours: RunArchive, theirs: RunArchive, found: Differences) -> None:
    """Compare the recorded tensors of every step, and the order in which they were processed."""

    def steps(archive: RunArchive) -> dict[tuple[int, int, int, int], object]:
        table: dict[tuple[int, int, int, int], object] = {}
        for folder in archive.folders():
            twice = Counter((entry.step, entry.link, entry.kind) for entry in read_manifest(folder))
            if twice and max(twice.values()) > 1:
                found.add(f"{folder}: has a step twice")
        for step in archive.steps():
            key = step.client, step.round, step.step, step.link
            files = {kind: entry.checksum for kind, entry in step.entries.items()}
            table[key] = step.order, files
        return table

    whole, other = steps(ours), steps(theirs)
    found.tensors += sum(len(files) for _, files in whole.values())  # type: ignore[misc]
    for key in sorted(whole.keys() | other.keys()):
        if whole.get(key) != other.get(key):
            client, round_index, step, link = key
            at = f"client_{client}/round_{round_index:03d}, step {step}, cut {link}"
            found.add(f"{at}: differs, or is missing")


def _compare_figures(ours: RecordedRun, theirs: RecordedRun, found: Differences) -> None:
    """Compare what the rounds' files say, but for times and bytes."""
    for round_index in range(ours.run.rounds):
        path = f"rounds/round_{round_index:03d}.csv"
        tables = []
        for recorded in (ours, theirs):
            lies_there = recorded.archive.lists(path)
            rows = read_round(recorded.archive.read(path)) if lies_there else {}
            tables.append({k: repr(v) for k, v in rows.items() if k[2].startswith(FIGURES)})
        if tables[0] != tables[1]:
            found.add(f"{theirs.archive.root / path}: differs")
    summaries = []
    for recorded in (ours, theirs):
        path = recorded.archive.root / "rounds.csv"
        rows = read_summary(path.read_bytes()) if path.exists() else []  # a hop has none
        names = ("round", "took_part", "train_loss", "val_loss", "test_loss")
        summaries.append([[row[name] for name in names] for row in rows])
    if summaries[0] != summaries[1]:
        found.add(f"{theirs.archive.root / 'rounds.csv'}: differs")
