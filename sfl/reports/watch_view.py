"""Draw a run for a terminal: rounds, clients, figures, its log's last lines."""

import itertools
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sfl.archive.live_status import AWAY, DOINGS, WAITING, Now
from sfl.errors import WAS_INTERRUPTED, counted, duration
from sfl.reports.watch_state import FAILED, OVER, RUNNING, SILENT, STOPPED, Line, Seen
from sfl.wire.link import one_line

MOST_TITLE = 30  # characters of a metric
MOST_HINT = 2000  # characters of a command, with a folder's path
MOST_CLIENTS, MOST_ROUNDS, MOST_LINES = 8, 5, 5  # that are shown
BAR = 60  # characters
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=*#"
STYLES = {
    RUNNING: "bold green",
    OVER: "bold",
    FAILED: "bold red",
    SILENT: "bold red",
    STOPPED: "bold",
}
AWAY_STYLE = "red"
MOST = 1e100  # a larger figure is in no curve: the sum of some must be finite


def frame(seen: Seen, silent_s: float, console: Console) -> Group:
    """Return one picture of a run; ``silent_s``: as ``Watched.look`` says."""
    parts: list[RenderableType] = [_title(seen), _progress(seen, silent_s, console)]
    if seen.state(silent_s) in (RUNNING, SILENT) and seen.status:
        parts.append(_clients(seen))
    if seen.rounds:
        parts.append(_figures(seen.rounds, console))
        if any("bytes_up" in line.figures for line in seen.rounds):  # a task's server has none
            parts.append(_traffic(seen.rounds))
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in _log(seen)]
    return Group(*parts)


def _log(seen: Seen) -> Sequence[str]:
    """Return the log's last lines, without the date."""
    return [one_line(line[len("2026-01-01 ") :]) for line in seen.log[-MOST_LINES:]]


def _title(seen: Seen) -> Text:
    config = seen.config
    text = Text(f"run {one_line(seen.path.resolve().name)}", style="bold", overflow="fold")
    names = [one_line(str(config[n])) for n in ("scheme", "model", "dataset") if config.get(n)]
    if isinstance(config.get("clients"), int):
        names.append(counted(config["clients"], "client"))
    if seen.role:
        names.append(one_line(seen.role))
    return text.append(f"  {', '.join(names)}", style="not bold")


def _progress(seen: Seen, silent_s: float, console: Console) -> RenderableType:
    """Return what the run is, a bar over all rounds, and the time that is left."""
    state, done, total = seen.state(silent_s), seen.num_done, seen.num_rounds
    goes_on = state == RUNNING and done < total and seen.in_round >= done
    share = done + (seen.round_share if goes_on else 0.0)
    if state == OVER:  # also of a run that has stopped early
        share = total = max(total, 1)
    width = min(console.width - 8, BAR)
    filled = round(width * share / total) if total else 0
    bar = Text(f"[{'#' * filled}{'.' * (width - filled)}] {share / total if total else 0:.0%}")
    words = Text(_state(seen, state, silent_s), style=STYLES[state], overflow="fold")
    if state in (SILENT, STOPPED) and (hint := seen.how_to_go_on):
        words.append(f"\n{one_line(hint, MOST_HINT)}", style="not bold")
    return Group(bar, words)


def _state(seen: Seen, state: str, silent_s: float) -> str:
    ends = {OVER: seen.why_stopped, FAILED: seen.last_words, STOPPED: WAS_INTERRUPTED}
    if state in ends:
        rounds, why = f"{seen.num_done} of {counted(seen.num_rounds, 'round')}", ends[state]
        return f"{rounds} done; {one_line(why)}" if why else f"{rounds} done"
    if state == SILENT:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - silent_s))
        return f"not written since {at}, {duration(silent_s)} ago: its process has ended or hangs"
    if seen.status is None:
        return "it is being prepared"
    if seen.status.now.round < 0:
        what = "waits for clients" if _waits(seen, seen.status.now) else "is being prepared"
        return f"the run has not begun: it {what}"
    left_s = seen.left_s
    left = "" if left_s is None else f", about {duration(left_s)} left for the whole run"
    return f"round {seen.status.now.round + 1} of {seen.num_rounds}{left}"


def _waits(seen: Seen, now: Now) -> bool:
    """Return whether clients are missing, before the first round."""
    here = [doing for doing in now.clients.values() if doing.what == WAITING]
    wanted = seen.config.get("clients")
    return len(here) < (wanted if isinstance(wanted, int) else len(now.clients))


def _clients(seen: Seen) -> RenderableType:
    """Return a line a client: those that are away first."""
    status = seen.status
    assert status is not None
    table = Table(
        "client", "does", "for", "steps", "", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    doings = status.now.clients
    order = sorted(doings, key=lambda k: (DOINGS.index(doings[k].what), k))
    shown = order if len(order) <= MOST_CLIENTS else order[: MOST_CLIENTS - 1]
    for k in sorted(shown):
        doing = doings[k]
        steps = f"{doing.steps} of {doing.of_steps}" if doing.of_steps else ""
        since = duration(max(status.written_at - status.since[k], 0.0))
        why = Text(one_line(doing.why), overflow="ellipsis", no_wrap=True)
        style = AWAY_STYLE if doing.what == AWAY else ""
        table.add_row(str(k), doing.what, since, steps, why, style=style)
    if left := Counter(doings[k].what for k in order[len(shown) :]):
        others = ", ".join(f"{count} {what}" for what, count in left.items())
        return Group(table, Text(f"and {others}", style="dim"))
    return table


def _shown(rounds: Sequence[Line]) -> dict[str, str]:
    """Return the figures that are shown, by their titles: the losses and the task's own metric.

    A task's own metric comes behind the loss in ``rounds.csv``.
    """
    titles = {"train_loss": "train loss", "val_loss": "val loss", "test_loss": "test loss"}
    for part in ("val", "test"):
        known = dict.fromkeys(n for line in rounds for n in line.figures)
        names = [n for n in known if n.startswith(f"{part}_") and n != f"{part}_loss"]
        titles |= {names[0]: names[0].replace("_", " ")} if names else {}
    return {n: title for n, title in titles.items() if any(n in line.figures for line in rounds)}


def _figures(rounds: Sequence[Line], console: Console) -> Table:
    """Return the last rounds, and a curve over all of them, a line a figure."""
    last = rounds[-MOST_ROUNDS:]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("round")
    for line in last:
        table.add_column(str(line.round_index + 1), justify="right")
    blocks = BLOCKS if "utf" in console.encoding.lower() else ASCII
    width = max(min(console.width - 14 - 8 * len(last), 40), 8)
    table.add_column(f"1 to {len(rounds)}" if len(rounds) > 1 else "", no_wrap=True)
    for name, title in _shown(rounds).items():
        cells = [_figure(line.figures[name]) if name in line.figures else "" for line in last]
        values = [line.figures[name] for line in rounds if name in line.figures]
        curve = sparkline(values, width, blocks) if len(values) > 1 else ""
        table.add_row(Text(one_line(title, MOST_TITLE)), *cells, curve)
    table.add_row("seconds", *(f"{line.seconds:.1f}" for line in last), "")
    return table


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Return a curve of at most ``width`` characters; of a longer one, each is a mean."""
    finite = [v for v in values if abs(v) < MOST]
    count = min(len(finite), width)
    cuts = [i * len(finite) // count for i in range(count + 1)] if count else [0]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((v - low) * scale)] for v in means)


def _traffic(rounds: Sequence[Line]) -> Text:
    up, down = (
        sum(line.figures.get(n, 0.0) for line in rounds) for n in ("bytes_up", "bytes_down")
    )
    text = f"{_size(up)} from clients, {_size(down)} to clients in {counted(len(rounds), 'round')}"
    missing = [line for line in rounds if line.is_short]
    if missing:
        text += f"; {counted(len(missing), 'round')} without some"
    return Text(text)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
