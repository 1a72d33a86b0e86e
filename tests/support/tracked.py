"""The figures of a run, as its files have them and as trackers' own formats have them."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sfl.archive.round_log import read_round, read_summary

Curves = dict[tuple[str, int], float]  # curve and place on it -> value
TEXTS = ("took_part", "missing")
BLOCK = 32768  # bytes of a W&B file's blocks


def curves_of_files(run: Path, steps_in_round: int) -> Curves:
    """Return every figure of ``rounds.csv`` and of the rounds' files."""
    found: Curves = {}
    for row in read_summary((run / "rounds.csv").read_bytes()):
        at = int(row.pop("round"))
        named = {n: v for n, v in row.items() if v and n not in TEXTS}
        found |= {(f"round/{name}", at): float(value) for name, value in named.items()}
        figures = read_round((run / f"rounds/round_{at:03d}.csv").read_bytes())
        for (client, file, metric), value in figures.items():
            if file.startswith("labels_"):
                step = int(file.removesuffix(".pt").split("_")[2])
                found[f"step/client_{client}/{metric}", at * steps_in_round + step] = value
            else:
                found[f"client_{client}/{metric}", at] = value
    return found


def curves_of_table(path: Path, steps_in_round: int) -> Curves:
    """Return what the table of ``--track csv`` has."""
    found: Curves = {}
    with open(path, newline="") as stream:
        for row in csv.DictReader(stream):
            whose = f"client_{row['client']}" if row["client"] else "round"
            at, step, name = int(row["round"]), row["step"], f"{whose}/{row['metric']}"
            key = (f"step/{name}", at * steps_in_round + int(step)) if step else (name, at)
            assert key not in found
            found[key] = float(row["value"])
    return found


class Events(NamedTuple):
    """What TensorBoard's event files have, by curve and place on it."""

    numbers: Curves
    texts: dict[tuple[str, int], str]
    histograms: set[tuple[str, int]]
    pictures: dict[tuple[str, int], bytes]  # PNG


def events_of(folder: Path) -> Events:
    """Return what TensorBoard's server would show of a folder."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import (
        TENSORS,
        EventAccumulator,
    )
    from tensorboard.util.tensor_util import make_ndarray

    found = Events({}, {}, set(), {})
    for name in ("rounds", "steps"):
        events = EventAccumulator(str(folder / name), size_guidance={TENSORS: 0}).Reload()
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                value, key = make_ndarray(event.tensor_proto), (tag, event.step)
                if tag.startswith("weights/"):
                    found.histograms.add(key)
                elif value.dtype == object and value.size > 1:  # width, height, picture
                    found.pictures[key] = value[2]
                elif value.dtype == object:
                    found.texts[key] = value.item().decode()
                else:
                    assert key not in found.numbers
                    found.numbers[key] = value.item()
    return found


def records_of(path: Path) -> Iterator[Any]:
    """Yield the records of a W&B run's file: LevelDB's log format, of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def rows_of_wandb(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a W&B run's history."""
    for record in records_of(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def curves_of_wandb(path: Path) -> Curves:
    """Return the numbers of a W&B run's file."""
    found: Curves = {}
    for row in rows_of_wandb(path):
        for name, value in row.items():
            if name.startswith("round/confusion/"):  # of a picture: its size, ...
                continue
            axis = "step" if name.startswith("step/") else "round"
            if "/" in name and isinstance(value, int | float):
                assert (name, row[axis]) not in found
                found[name, row[axis]] = value
    return found
