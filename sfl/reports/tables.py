"""The tables of a report, as frames of text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import pandas as pd

from sfl.archive.run_folder import RUN_STOPS
from sfl.config import RunConfig
from sfl.errors import counted, shortened
from sfl.interactive.run import Run
from sfl.reports.gathered import Group, environment, options, shown_metric, texts

MOST_OF_CELL = 300  # characters
MOST_EVENTS = 200  # lines of a run
TIMES = {
    "client_compute_s": "computing", "client_transfer_s": "sending, receiving",
    "client_wait_s": "waiting for the server", "server_compute_s": "computing at the server",
}  # fmt: skip
# Lines of the server's log that tell of failures and recoveries.
_TROUBLE = re.compile(
    r"\bis (away|back|refused)\b|going on with|warning|error|turned away|interrupted"
    r"|no progress|taken over|\bmissing\b|trying|did not|cannot"
)
_KIND = re.compile(r"bytes_(up|down)_(\w+?)(?:_(\d+))?")


class Compared(NamedTuple):
    """Values side by side, a column a group."""

    differ: pd.DataFrame
    same: pd.DataFrame


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Return mean and standard deviation over seeds; where all agree, the value."""
    series = pd.Series(list(values)).dropna().astype(float)
    if series.empty:
        return "-"
    mean = f"{series.mean():,.{digits}f}"
    return mean if series.nunique() == 1 else f"{mean} ± {series.std(ddof=1):,.{digits}f}"


def kinds(run: Run) -> dict[str, str]:
    """Return the columns of the bytes by content, with what they are."""
    found = ((name, _KIND.fullmatch(name)) for name in run.rounds.columns)
    return {
        name: f"{kind[2]} {kind[1]}" + (f", link {kind[3]}" if kind[3] else "")
        for name, kind in found
        if kind
    }


def a_round(run: Run, column: str) -> float:
    """Return the mean of a column over the rounds of a run."""
    return float(run.rounds[column].mean()) if column in run.rounds else float("nan")


def a_client(run: Run, column: str) -> float:
    """Return the mean of a column over the rounds and the clients that took part."""
    rows = run.clients
    if column not in rows:
        return float("nan")
    return float(rows[rows["samples"] > 0][column].mean())


def last(run: Run, column: str) -> float:
    """Return the last value of a column that there is."""
    values = run.rounds[column].dropna().tolist() if column in run.rounds else []
    return values[-1] if values else float("nan")


def state(run: Run) -> str:
    """Return how far a run has come."""
    done = len(run.rounds)
    if done == run.config.rounds:
        return counted(done, "round")
    return f"{counted(done, 'round')} of {run.config.rounds}" + (
        ", stopped early" if why_stopped(run) else ""
    )


def why_stopped(run: Run) -> str:
    """Return the line of the log that says why --stop-when ended the run; "" if it did not."""
    return next((text for _, text in run.events if text.startswith(RUN_STOPS)), "")


def overview(groups: Sequence[Group]) -> pd.DataFrame:
    """Return a row for each run."""
    rows = [
        {"runs": group.label, "name": run.name, "seed": run.config.seed,
         "finished": state(run), "started": run.archive.environment().get("started", "-")}
        for group in groups
        for run in group.runs
    ]  # fmt: skip
    return _texts(rows)


def final(groups: Sequence[Group]) -> pd.DataFrame:
    """Return the last round's figures of each group, mean and standard deviation over seeds."""
    names = dict.fromkeys(n for group in groups for n in group.first.rounds.columns)
    metrics = [n for n in names if n.startswith(("test_", "val_"))]
    metrics.sort(key=lambda name: name.startswith("val_"))
    rows = []
    for group in groups:
        row = {"runs": group.label, "seeds": str(len(group.runs))}
        row |= {name: spread(last(run, name) for run in group.runs) for name in metrics}
        rows.append(row)
    table = _texts(rows)
    return table.loc[:, (table != "-").any()]


def by_client(groups: Sequence[Group]) -> pd.DataFrame:
    """Return the last figures of each client, mean and standard deviation over seeds."""
    rows = []
    for group in groups:
        metric, _ = shown_metric(group.first)
        columns = [f"{part}_{name}" for part in ("val", "test") for name in ("loss", metric)]
        for client in group.first.client_ids:
            tables = [run.clients[run.clients["client"] == client] for run in group.runs]
            row = {"runs": group.label, "client": str(client)}
            row["samples"] = spread((t["samples"].max() for t in tables if len(t)), 0)
            for name in columns:
                found = (t[name].dropna() for t in tables if name in t)
                row[name] = spread(values.iloc[-1] for values in found if len(values))
            rows.append(row)
    return _texts(rows)


def traffic(groups: Sequence[Group]) -> pd.DataFrame:
    """Return the bytes of a round by content and link."""
    rows = []
    for group in groups:
        columns = {"bytes_up": "all up", "bytes_down": "all down", **kinds(group.first)}
        row = {"runs": group.label}
        for name, title in columns.items():
            row[title] = spread((a_round(run, name) / 1e6 for run in group.runs), 3)
        rows.append(row)
    return _texts(rows)


def times(groups: Sequence[Group]) -> pd.DataFrame:
    """Return the seconds of a round, and of a client in it."""
    rows = []
    for group in groups:
        row = {"runs": group.label}
        row["the round"] = spread((a_round(run, "seconds") for run in group.runs), 3)
        for name, title in TIMES.items():
            row[title] = spread((a_client(run, name) for run in group.runs), 3)
        rows.append(row)
    return _texts(rows)


def compared_options(groups: Sequence[Group]) -> Compared:
    """Return the options of all groups: those that differ, and those that do not.

    Of one group, those that differ from the defaults.
    """
    defaults = {} if len(groups) > 1 else texts(asdict(RunConfig()))
    return _compared("option", {g.label: options(g) for g in groups}, defaults)


def compared_environments(groups: Sequence[Group]) -> Compared:
    """Return what all groups were computed with: what differs, and what does not."""
    return _compared("what", {g.label: environment(g) for g in groups}, {})


def _compared(
    name: str, columns: Mapping[str, Mapping[str, str]], usual: Mapping[str, str]
) -> Compared:
    table = pd.DataFrame(columns, dtype=str).fillna("-")
    others = pd.Series({n: usual.get(n, table.loc[n].iloc[0]) for n in table.index}, dtype=str)
    differ = pd.concat([table, others], axis=1).nunique(axis=1) > 1
    shown = table.map(lambda text: shortened(text, MOST_OF_CELL)).rename_axis(name)
    same = shown[~differ].iloc[:, :1].set_axis(["value"], axis=1)
    # A label may be the name of the first column, too.
    return Compared(shown[differ].reset_index(allow_duplicates=True), same.reset_index())


def troubles(groups: Sequence[Group]) -> pd.DataFrame:
    """Return the lines of the servers' logs that tell of failures and recoveries."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        lines = [line for line in run.events if _TROUBLE.search(line[1])]
        rows += [{"run": run.name, "time": t, "event": text} for t, text in lines][:MOST_EVENTS]
        if len(lines) > MOST_EVENTS:
            left = len(lines) - MOST_EVENTS
            rows.append({"run": run.name, "time": "", "event": f"and {left} more lines"})
    return _texts(rows)


def _texts(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Return rows as a frame of shortened texts."""
    table = pd.DataFrame(rows).fillna("-")
    return table.map(lambda value: shortened(value, MOST_OF_CELL))
