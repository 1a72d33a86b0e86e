"""What came out of a comparison: its tables and figures, read from the runs' files alone."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

import sfl.archive
from experiments.compare.study import NO_CUT, Cell, Study
from experiments.support.costs import client_flops, formula_bytes
from sfl.archive.round_log import DOWN, TRAFFIC, UP, read_round, round_figures
from sfl.config import RunConfig
from sfl.conversation.cut import kinds_by_link
from sfl.data.client_data import batch_sizes, num_batches
from sfl.model.task import TASKS
from sfl.reports.tables import spread
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES, Exchange
from sfl.strategy.split_model import SplitModel
from sfl.weights.stores import SOCKET
from sfl.wire.link import KINDS_DOWN, KINDS_UP

CELL = list(Cell._fields)
RUN = [*CELL, "seed"]
LINE = [*RUN, "round", "client"]
ALL = "all"  # in the column of clients
MOST_CLIENTS = 10  # that have a column of their own
TASK = TASKS[RunConfig.task]  # what a study compares schemes at
LEARNING = [n for n in round_figures(TASK) if n.partition("_")[0] in ("train", "val", "test")]
WAITS = ["client_wait_s", "client_transfer_s"]
TIMES = ["seconds", "server_compute_s", "client_compute_s", "client_wait_s", "client_transfer_s"]
FORMULA = ("formula_smashed_bytes", "formula_weights_bytes")
COUNTED = ["samples", *LEARNING, *TRAFFIC, "client_gflops", *FORMULA]


def read_run(path: Path, run: RunConfig, cell: Cell) -> pd.DataFrame:
    """Return a line for each round and client of a run, and one for all its clients.

    ``client_gflops`` is a client's arithmetic in the round's training (of ``central``, the whole
    model's), ``formula_..._bytes`` what it sends and receives in it by the field's formulas; of all
    clients they are sums.
    """
    archive = sfl.archive.open(path)
    data, recipe = archive.environment()["data"], Recipe.of(run)
    pooled, split = recipe.scheme.pooled, SplitModel.of_data(recipe, data)
    # Clients have one model, unless each has its part of each sample.
    models = {k: split.of_party(k) for k in map(int, data["num_samples"])}
    flops = {model: client_flops(model) for model in models.values()}
    up, down = kinds_by_link(recipe.segments)
    by_link = [*map(UP.format, up), *map(DOWN.format, down)]
    known = round_figures(TASK, by_link)
    with open(path / "rounds.csv", newline="") as stream:
        overall = list(csv.DictReader(stream))
    lines = []
    for of_round in overall:
        round_index = int(of_round["round"])
        figures = read_round(archive.read(f"rounds/round_{round_index:03d}.csv"))
        clients = _clients(figures, run)
        for client, metrics in clients.items():
            samples = int(metrics["samples"])
            steps = num_batches(samples, run.batch_size) * run.local_epochs if samples else 0
            model = models[client]
            metrics["client_gflops"] = samples * run.local_epochs * flops[model] / 1e9
            metrics |= zip(FORMULA, formula_bytes(run, model, samples, steps), strict=True)
            lines.append({"client": str(client), "round": round_index, **metrics})
        sums = {
            name: sum(metrics[name] for metrics in clients.values())
            for name in ("samples", "client_gflops", *FORMULA)
        }
        numbers = {n: float(v) for n, v in of_round.items() if v and n in known}
        lines.append({"client": ALL, "round": round_index, **numbers, **sums})
    frame = pd.DataFrame(lines)
    for name, value in zip(RUN, (*cell, run.seed), strict=True):
        frame[name] = value
    if pooled:  # nothing crosses anything, and nobody waits
        frame[[*TRAFFIC, *WAITS]] = float("nan")
    whole = ["samples", *TRAFFIC, *FORMULA, *by_link]
    frame[whole] = frame[whole].astype("Int64")
    return frame.reindex(columns=[*LINE, *COUNTED, *TIMES, *by_link])


def _clients(
    figures: dict[tuple[int, str, str], float], run: RunConfig
) -> dict[int, dict[str, float]]:
    """Return each client's metrics of a round; those of steps weighted by their samples."""
    clients: dict[int, dict[str, float]] = {}
    steps: dict[tuple[int, str], list[float]] = {}
    for (client, _, metric), value in figures.items():
        of_client = clients.setdefault(client, {})
        if metric in ("loss", "acc"):
            steps.setdefault((client, f"train_{metric}"), []).append(value)
        else:
            of_client[metric] = value
    for (client, metric), values in steps.items():
        samples = int(clients[client]["samples"])
        sizes = list(batch_sizes(samples, run.batch_size)) * run.local_epochs
        weighted = math.fsum(v * n for v, n in zip(values, sizes, strict=True))
        clients[client][metric] = weighted / sum(sizes)
    return dict(sorted(clients.items()))


def read_study(study: Study) -> pd.DataFrame:
    """Return the lines of all runs of a study."""
    lines = [read_run(study.folder(run), run, cell) for cell, run in study.runs_of_cells]
    return pd.concat(lines, ignore_index=True)


def write_tables(study: Study, lines: pd.DataFrame) -> list[Path]:
    """Write a study's tables, and return their paths."""
    out = study.node.out_path
    by_link = [name for name in lines.columns if name not in {*LINE, *COUNTED, *TIMES}]
    tables = {"compare.csv": [*LINE, *COUNTED, *by_link], "times.csv": [*LINE, *TIMES]}
    paths = []
    for name, columns in tables.items():
        paths.append(out / name)
        lines[columns].to_csv(paths[-1], index=False)
    paths.append(out / "compare.md")
    paths[-1].write_text(markdown(study, lines))
    return paths


def last_rounds(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the line of the last round of each run and client."""
    return lines[lines["round"] == lines.groupby(RUN)["round"].transform("max")]


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(study: Study, lines: pd.DataFrame) -> str:
    """Return the study's tables, with mean and spread over the seeds."""
    run = study.run
    seeds = f"{min(study.seeds)} to {max(study.seeds)}" if len(study.seeds) > 1 else str(run.seed)
    apart = {*RUN, *study.sweeps, "run", "keep_tensors"}
    named = {
        n: v
        for n, v in vars(run).items()
        if v != RunConfig.__dataclass_fields__[n].default and n not in apart
    }
    options = " ".join(f"--{n.replace('_', '-')} {v}" for n, v in named.items())
    node = study.node
    timed = (
        ""
        if study.over == "sockets"
        else (
            " Over simulation all work is done in one process: waiting is for the others' work, and"
            " nothing is transferred."
        )
    )
    parts = [
        f"{run.model} on {run.dataset}, {run.clients} clients, {run.rounds} rounds, over"
        f" {study.over}, seeds {seeds}, {study.jobs} at a time, {node.threads} thread(s), device"
        f" {node.device}; `{options}`\n",
        "## Accuracy\n\nOf the last round's model on the test set; the gap is to `central`.\n",
        _accuracies(study, lines),
        "## Clients\n\nTest accuracy of each client's part of the test set.\n",
        _of_clients(study, lines),
        "## Cost of a round, a client\n\nMeans over rounds and clients that took part. FLOPs and MB"
        f" are of training alone; round trips and the server's seconds have validation in them."
        f"{timed}\n",
        _costs(study, lines),
        "## Measured bytes and the formulas\n\nMB a client that took part in a round, training"
        " alone. Formulas: Thapa et al. 2022, Table 2 (FL `2|W|`; SL, SFL `2(p/K)q + 2 beta |W|`;"
        " `q` is summed over the cuts, `beta` the share of the client's segments)."
        " The excess is labels, control messages, weights beyond the formula (buffers, files'"
        " heads, in `sl` and with --participation below 1 the front that is sent once more for"
        " validation, in `sync-sgd` a round's average, and what is sent to clients that have no"
        " batch left), and the heads of files and frames of activations and gradients.\n",
        _bytes(study, lines),
    ]
    return "\n".join(parts)


def of_cell(lines: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Return the lines of one cell."""
    return lines[(lines[CELL] == list(cell)).all(axis=1)]


def _accuracies(study: Study, lines: pd.DataFrame) -> str:
    last = last_rounds(lines)
    last = last[last["client"] == ALL]
    metrics = [f"test_{n}" for n in TASK.evaluated[1:]]
    rows = []
    for cell in study.cells:
        own, gap = of_cell(last, cell).set_index("seed"), "-"
        central = cell._replace(scheme="central", topology=NO_CUT, cut=NO_CUT)
        if central in study.cells and cell != central:
            gap = spread(own["test_acc"] - of_cell(last, central).set_index("seed")["test_acc"])
        rows.append([*cell, *(spread(own[m]) for m in metrics), gap])
    return _table([*CELL, "accuracy", "balanced accuracy", "macro F1", "weighted F1", "gap"], rows)


def _of_clients(study: Study, lines: pd.DataFrame) -> str:
    last = last_rounds(lines)
    clients = sorted(set(last["client"]) - {ALL}, key=int)
    rows = []
    for cell in study.cells:
        if SCHEMES[cell.scheme].pooled:
            continue
        by_client = of_cell(last, cell).pivot(index="seed", columns="client", values="test_acc")
        by_client = by_client.reindex(columns=clients)  # --sweep clients=2,3: some have fewer
        if len(clients) > MOST_CLIENTS:
            shown = by_client[clients]
            columns = [shown.min(axis=1), shown.mean(axis=1), shown.max(axis=1)]
        else:
            columns = [by_client[client] for client in clients]
        rows.append([*cell, *map(spread, columns)])
    many = len(clients) > MOST_CLIENTS
    header = ["lowest", "mean", "highest"] if many else [f"client {client}" for client in clients]
    return _table([*CELL, *header], rows)


def training_bytes(lines: pd.DataFrame, direction: str) -> pd.Series:
    """Return the bytes of training, ``up`` or ``down``, of each line: validation apart."""
    return lines[f"bytes_{direction}"] - lines[f"bytes_{direction}_validation"]


def _trained(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the lines of clients that took part, with the bytes of training."""
    own = lines[(lines["client"] != ALL) & (lines["samples"] > 0)].copy()
    for direction in ("up", "down"):
        own[f"training_{direction}"] = training_bytes(own, direction)
    return own


def _costs(study: Study, lines: pd.DataFrame) -> str:
    trained, rows = _trained(lines), []
    columns = {
        "GFLOPs": ("client_gflops", 1, 2), "MB up": ("training_up", 1e6, 2),
        "MB down": ("training_down", 1e6, 2), "round trips": ("round_trips", 1, 0),
        "server s": ("server_compute_s", 1, 2), "client s": ("client_compute_s", 1, 2),
        "waiting s": ("client_wait_s", 1, 2), "transfer s": ("client_transfer_s", 1, 2),
    }  # fmt: skip
    for cell in study.cells:
        by_seed = of_cell(trained, cell).groupby("seed")
        values = [
            spread(by_seed[column].mean() / unit, digits)
            for column, unit, digits in columns.values()
        ]
        rows.append([*cell, *values])
    return _table([*CELL, *columns], rows)


def _bytes(study: Study, lines: pd.DataFrame) -> str:
    if study.run.weights != SOCKET:
        return f"Weights went through {study.run.weights}, where they are not counted.\n"
    trained, rows = _trained(lines), []
    for cell in study.cells:
        if SCHEMES[cell.scheme].pooled:
            continue
        means = of_cell(trained, cell).mean(numeric_only=True) / 1e6
        carried = {
            kind: means.get(UP.format(kind), 0) + means.get(DOWN.format(kind), 0)
            for kind in {*KINDS_UP, *KINDS_DOWN}
        }
        measured = means["training_up"] + means["training_down"]
        smashed, weights = (means[column] for column in FORMULA)
        as_weights = carried["weights"]
        if (
            SCHEMES[cell.scheme].exchange is Exchange.WEIGHT_GRADS
        ):  # whose gradients are the weights'
            as_weights += carried["gradients"]
        excess = {
            "labels": carried["labels"],
            "control": carried["control"],
            "weights": as_weights - weights,
        }
        heads = measured - smashed - weights - sum(excess.values())
        rows.append([
            *cell, f"{smashed + weights:.3f}", f"{measured:.3f}",
            f"{100 * (measured / (smashed + weights) - 1):.2f} %",
            *(f"{v:.3f}" for v in (*excess.values(), heads)),
        ])  # fmt: skip
    header = ["formula", "measured", "excess", "of it labels", "control", "weights", "heads"]
    return _table([*CELL, *header], rows)
