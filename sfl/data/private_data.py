"""A client's own private data (``--partition own``): class folders of images, or an ``.npz``.

Every client must have the same classes, but may lack samples of some. The user is told what is
read, and what is left out and why.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from sfl.config import RunConfig
from sfl.data.augment import NONE
from sfl.data.client_data import ClientData, DatasetSpec, Identified, client_data
from sfl.data.image_folders import IMAGE_SUFFIXES, LAYOUT, is_of_system, read_folders, sort_out
from sfl.data.npz import none_of, read_ids, read_npz, read_table
from sfl.errors import DataError

MOST_MEASURED = 256  # samples of which mean and deviation are reported


def load_own(
    spec: DatasetSpec,
    run: RunConfig,
    client: int,
    data_dir: Path,
    *,
    say: Callable[[str], object] = print,
    has_ids: bool = False,
    columns: Collection[str] = (),
) -> ClientData:
    """Return a client's own data; without a validation part, a fifth is held out for it.

    ``has_ids``: all clients have parts of the same samples, see ``_load_identified``.
    ``columns``: names of further labels, of an ``.npz`` file.

    Raises:
        ConfigError: the samples cannot be augmented, or normalised as the run says.
        DataError: there are no data, a file is damaged, or samples do not fit the data set.
    """
    archive = _archive(data_dir, say)
    if has_ids:
        return _load_identified(spec, run, client, archive, say, columns)
    if archive is not None:
        any_range = has_any_range(spec, run)
        parts = read_npz(archive, spec, say, any_range=any_range, columns=columns)
    elif data_dir.is_dir():
        if columns:
            raise DataError(f"{data_dir}: further labels ({', '.join(columns)}) need an .npz file")
        parts = read_folders(data_dir, spec, say)
    else:
        raise DataError(f"no own data at {data_dir}: give --data-dir a folder or an .npz file")
    if not len(parts.train):
        raise DataError(f"{data_dir} holds no training samples; {LAYOUT}")
    data = client_data(
        spec, run, client, parts.train, parts.test,
        classes=parts.classes, validation=parts.validation,
    )  # fmt: skip
    data = dataclasses.replace(data, columns=parts.columns)
    if run.normalize:
        x, _ = data.batch(data.train, slice(0, MOST_MEASURED))
        mean, std = float(x.mean()), float(x.std(correction=0))
        say(f"normalised by {run.normalize}: samples have mean {mean:.3g} and deviation {std:.3g}")
    return data


def _load_identified(
    spec: DatasetSpec,
    run: RunConfig,
    client: int,
    archive: Path | None,
    say: Callable[[str], object],
    columns: Collection[str],
) -> ClientData:
    """Return a client's part of samples that it shares with others, to be aligned by their ids.

    The samples may be a table, which is neither normalised nor augmented.
    """
    if archive is None:
        raise DataError("clients that are joined: give --data-dir an .npz file with ids")
    if table := read_table(archive, lambda line: None):
        spec = dataclasses.replace(spec, input_shape=table, mean=0.0, std=1.0, augment=NONE)
        run = dataclasses.replace(run, augment="", normalize="")
    has_labels = client == run.label_client
    columns = columns if has_labels else ()
    parts = read_npz(
        archive, spec, say,
        any_range=has_any_range(spec, run), has_labels=has_labels, columns=columns,
    )  # fmt: skip
    data = client_data(
        spec, run, client, parts.train, parts.test,
        classes=parts.classes, validation=parts.validation or none_of(spec, columns),
    )  # fmt: skip
    in_order = parts.train.sized(spec.input_shape)  # of the ids
    identified = Identified(read_ids(archive), run)
    return dataclasses.replace(
        data, train=in_order, identified=identified, columns=parts.columns, has_labels=has_labels
    )


def has_any_range(spec: DatasetSpec, run: RunConfig) -> bool:
    """Return whether floats may be of any range: the mean and std are given for these data."""
    return bool(run.normalize) or ":" in run.dataset or not spec.has_images


def num_images(data_dir: Path) -> int:
    """Return the number of image files below a folder."""
    return sum(path.suffix.lower() in IMAGE_SUFFIXES for path in data_dir.rglob("*"))


def _archive(data_dir: Path, say: Callable[[str], object]) -> Path | None:
    """Return the ``.npz`` file that ``data_dir`` is or contains; None if there is none."""
    if data_dir.suffix.lower() == ".npz" and not data_dir.is_dir():
        return data_dir
    if not data_dir.is_dir():
        return None

    def why_not(path: Path) -> str:
        if path.suffix.lower() == ".npz" and not is_of_system(path):
            return ""
        return "beside the .npz file"

    archives, beside = sort_out(data_dir, why_not)
    if len(archives) > 1:
        raise DataError(f"{data_dir} has {len(archives)} .npz files; give --data-dir one of them")
    if archives and beside:
        say(f"{data_dir}: {beside}")
    return archives[0] if archives else None
