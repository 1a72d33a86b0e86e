"""What came out of a comparison: its tables and figures, read from the runs' files alone."""

import csv
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

import sfl.archive
from experiments.costs import costs_of, formula_bytes
from experiments.plan import Study
from sfl.config import RunConfig
from sfl.data import num_batches
from sfl.link import KINDS_DOWN, KINDS_UP
from sfl.roundlog import DOWN, EVALUATED, TRAFFIC, UP, read_round
from sfl.schemes import scheme
from sfl.split_model import SplitModel

CELL = ["partition", "scheme"]
RUN = [*CELL, "seed"]
ALL = "all"  # in the column of clients
LEARNING = [
    "train_loss", "train_acc", *(f"{part}_{n}" for part in ("val", "test") for n in EVALUATED),
]  # fmt: skip
TIMES = ["seconds", "server_compute_s", "client_compute_s", "client_wait_s", "client_transfer_s"]
FORMULA = ("formula_smashed_bytes", "formula_weights_bytes")
COUNTED = ["samples", *LEARNING, *TRAFFIC, "client_gflops", *FORMULA]


def read_run(path: Path, run: RunConfig) -> pd.DataFrame:
    """Return a line for each round and client of a run, and one for all its clients.

    ``client_gflops`` is a client's arithmetic in the round's training, ``formula_..._bytes`` what
    it sends and receives in it by the field's formulas; of all clients they are sums.
    """
    archive = sfl.archive.open(path)
    data = archive.environment()["data"]
    split = SplitModel.of_data(run, data)
    front = costs_of(split, tuple(data["input_shape"]))[0]
    with open(path / "rounds.csv", newline="") as stream:
        overall = list(csv.DictReader(stream))
    lines = []
    for of_round in overall:
        round_index = int(of_round["round"])
        figures = read_round(archive.read(f"rounds/round_{round_index:03d}.csv"))
        clients = _clients(figures)
        for client, metrics in clients.items():
            samples = int(metrics["samples"])
            steps = num_batches(samples, run.batch_size) * run.local_epochs if samples else 0
            metrics["client_gflops"] = samples * run.local_epochs * front.training_flops / 1e9
            metrics |= zip(FORMULA, formula_bytes(run, split, samples, steps), strict=True)
            lines.append({"client": str(client), "round": round_index, **metrics})
        sums = {
            name: sum(metrics[name] for metrics in clients.values())
            for name in ("samples", "client_gflops", *FORMULA)
        }
        numbers = {name: float(v) for name, v in of_round.items() if v != "" and name != "round"}
        lines.append({"client": ALL, "round": round_index, **numbers, **sums})
    frame = pd.DataFrame(lines)
    for name, value in zip(RUN, (run.partition, run.scheme, run.seed), strict=True):
        frame[name] = value
    whole = ["samples", *TRAFFIC, *FORMULA]
    frame[whole] = frame[whole].astype("int64")
    return frame.reindex(columns=[*RUN, "round", "client", *COUNTED, *TIMES])


def _clients(figures: dict[tuple[int, str, str], float]) -> dict[int, dict[str, float]]:
    """Return each client's metrics of a round, with the means over its steps."""
    clients: dict[int, dict[str, float]] = {}
    steps: dict[tuple[int, str], list[float]] = {}
    for (client, _, metric), value in figures.items():
        of_client = clients.setdefault(client, {})
        if metric in ("loss", "acc"):
            steps.setdefault((client, f"train_{metric}"), []).append(value)
        else:
            of_client[metric] = value
    for (client, metric), values in steps.items():
        clients[client][metric] = sum(values) / len(values)
    return dict(sorted(clients.items()))


def read_study(study: Study) -> pd.DataFrame:
    """Return the lines of all runs of a study."""
    return pd.concat([read_run(study.folder(run), run) for run in study.runs], ignore_index=True)


def write_results(study: Study) -> list[Path]:
    """Write a study's tables and figures, and return their paths."""
    from experiments.comparison_figures import draw_all

    out, lines = study.node.out_path, read_study(study)
    tables = {
        "compare.csv": [*RUN, "round", "client", *COUNTED],
        "times.csv": [*RUN, "round", "client", *TIMES],
    }
    paths = []
    for name, columns in tables.items():
        paths.append(out / name)
        lines[columns].to_csv(paths[-1], index=False)
    paths.append(out / "compare.md")
    paths[-1].write_text(markdown(study, lines))
    return paths + draw_all(study, lines, out)


def last_rounds(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the line of the last round of each run and client."""
    return lines[lines["round"] == lines.groupby(RUN)["round"].transform("max")]


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Return mean and standard deviation over seeds; of one seed, the value."""
    series = pd.Series(list(values)).dropna()
    if series.empty:
        return "-"
    mean = f"{series.mean():.{digits}f}"
    return mean if len(series) == 1 else f"{mean} ± {series.std(ddof=1):.{digits}f}"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(study: Study, lines: pd.DataFrame) -> str:
    """Return the study's tables, with mean and spread over the seeds."""
    run = study.run
    seeds = f"{min(study.seeds)} to {max(study.seeds)}" if len(study.seeds) > 1 else str(run.seed)
    named = {
        n: v
        for n, v in vars(run).items()
        if v != RunConfig.__dataclass_fields__[n].default and n not in (*RUN, "run", "keep_tensors")
    }
    options = " ".join(f"--{n.replace('_', '-')} {v}" for n, v in named.items())
    parts = [
        f"{run.model} on {run.dataset}, {run.clients} clients, {run.rounds} rounds, over"
        f" {study.over}, seeds {seeds}; `{options}`\n",
        "## Accuracy\n\nOf the last round's model on the test set; the gap is to `central`.\n",
        _accuracies(study, lines),
        "## Clients\n\nTest accuracy of each client's part of the test set.\n",
        _of_clients(study, lines),
        "## Cost of a round's training, a client\n\nMeans over clients, in the last round.\n",
        _costs(study, lines),
        "## Measured bytes and the formulas\n\nMB a client in a round, training alone. Formulas:"
        " Thapa et al. 2022, Table 2 (FL `2|W|`; SL, SFL `2(p/K)q + 2 beta |W|`). The excess is"
        " labels, control messages, weights beyond the formula (buffers, files' heads, and in `sl`"
        " the front that is sent once more for validation), and the heads of files and frames of"
        " activations and gradients.\n",
        _bytes(study, lines),
    ]
    return "\n".join(parts)


def _cells(study: Study) -> list[tuple[str, str]]:
    return [(partition, scheme) for partition in study.partitions for scheme in study.schemes]


def _of_cell(lines: pd.DataFrame, partition: str, name: str) -> pd.DataFrame:
    return lines[(lines["partition"] == partition) & (lines["scheme"] == name)]


def _accuracies(study: Study, lines: pd.DataFrame) -> str:
    last = last_rounds(lines)
    last = last[last["client"] == ALL]
    metrics = [f"test_{n}" for n in EVALUATED[1:]]
    rows = []
    for partition, name in _cells(study):
        of_cell = _of_cell(last, partition, name).set_index("seed")
        gap = "-"
        if "central" in study.schemes and name != "central":
            central = _of_cell(last, partition, "central").set_index("seed")
            gap = spread(of_cell["test_acc"] - central["test_acc"])
        rows.append([partition, name, *(spread(of_cell[m]) for m in metrics), gap])
    return _table([*CELL, "accuracy", "balanced accuracy", "macro F1", "weighted F1", "gap"], rows)


def _of_clients(study: Study, lines: pd.DataFrame) -> str:
    last = last_rounds(lines)
    clients = sorted(set(last["client"]) - {ALL}, key=int)
    rows = []
    for partition, name in _cells(study):
        if scheme(name).pooled:
            continue
        of_cell = _of_cell(last, partition, name)
        rows.append(
            [partition, name]
            + [spread(of_cell[of_cell["client"] == client]["test_acc"]) for client in clients]
        )
    return _table([*CELL, *(f"client {client}" for client in clients)], rows)


def _costs(study: Study, lines: pd.DataFrame) -> str:
    last = last_rounds(lines)
    last = last[last["client"] != ALL]
    rows = []
    for partition, name in _cells(study):
        of_cell = _of_cell(last, partition, name)
        traffic = [
            f"{of_cell['bytes_up'].mean() / 1e6:.2f}",
            f"{of_cell['bytes_down'].mean() / 1e6:.2f}",
            f"{of_cell['round_trips'].mean():.0f}",
        ]
        if scheme(name).pooled:
            traffic = ["-"] * len(traffic)
        gflops = f"{of_cell['client_gflops'].mean():.1f}"
        rows.append(
            [partition, name, gflops, *traffic, *(f"{of_cell[n].mean():.2f}" for n in TIMES[1:])]
        )
    header = ["GFLOPs", "MB up", "MB down", "round trips", "server s", "client s", "waiting s"]
    return _table([*CELL, *header, "transfer s"], rows)


def _bytes(study: Study, lines: pd.DataFrame) -> str:
    last = last_rounds(lines)
    last = last[last["client"] != ALL]
    rows = []
    for partition, name in _cells(study):
        if scheme(name).pooled:
            continue
        means = _of_cell(last, partition, name).mean(numeric_only=True) / 1e6
        carried = {
            kind: means.get(UP.format(kind), 0) + means.get(DOWN.format(kind), 0)
            for kind in {*KINDS_UP, *KINDS_DOWN}
        }
        measured = sum(carried.values()) - carried["validation"]
        smashed, weights = (means[name] for name in FORMULA)
        excess = {
            "labels": carried["labels"],
            "control": carried["control"],
            "weights": carried["weights"] - weights if weights else 0.0,
        }
        heads = measured - smashed - weights - sum(excess.values())
        rows.append([
            partition, name, f"{smashed + weights:.3f}", f"{measured:.3f}",
            f"{100 * (measured / (smashed + weights) - 1):.2f} %",
            *(f"{v:.3f}" for v in (*excess.values(), heads)),
        ])  # fmt: skip
    header = ["formula", "measured", "excess", "of it labels", "control", "weights", "heads"]
    return _table([*CELL, *header], rows)
