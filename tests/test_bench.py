"""experiments.bench: what it reports, and one small run of it."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from experiments.bench import __main__ as bench
from experiments.bench import turns
from experiments.bench.contenders import Sample, _span
from experiments.bench.peers.sockets import COUNT
from experiments.bench.report import Result, phases_table, table, write_all
from experiments.bench.rows import Row
from experiments.bench.transports import TRANSPORTS, Plan
from experiments.measure.many_clients import numbers
from sfl.errors import ConfigError
from sfl.files.torch_file import encode
from sfl.values import LinkShape

BARE = "bare TCP, nothing checked"
ROW = Row("mlp", 128, 1)
ALONE = Result(ROW, turns.ALONE, [Sample(s, 0.002) for s in (0.002, 0.001, 0.003)], [], 2**20)
OURS = Result(
    ROW,
    "SFL, archive on",
    [Sample(0.003, 0.004, 1000.0, 1.0, 0.01, {"wait": 0.001}, {"load": 0.0005})] * 2,
    [1.4, 1.6, 1.5],
    3 * 2**20,
)


def test_the_table_has_medians_quartiles_and_ratios() -> None:
    lines = table([ALONE, OURS]).splitlines()
    assert "| arithmetic alone | 2.00 | 1.50 to 2.50 | 1.00 | +0.00 |  |  | 2.00 | 1 |" in lines
    wanted = "| SFL, archive on | 3.00 | 3.00 to 3.00 | 1.50 | +1.00 | 1,000 | 1.00 | 4.00 | 3 |"
    assert wanted in lines


def test_the_phases_are_those_of_our_own_runs() -> None:
    shown = phases_table([ALONE, OURS])
    assert "| SFL, archive on, client | 1.000 |" in shown
    assert "arithmetic" not in shown


def test_a_link_is_compared_with_what_it_must_take() -> None:
    model, ours = turns.modelled(ALONE, OURS, LinkShape(bytes_per_s=1e6, delay_s=0.01))
    assert model.ms == pytest.approx(2.0 + 2 * 10 + 1.0)
    assert ours.ratio == pytest.approx(3.0 / 23.0)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    paths = write_all(tmp_path / "new", [[ALONE, OURS]])
    assert [path.name for path in paths] == ["bench.csv", "bench.md", "bench.png"]
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [float(row["ratio"]) for row in rows] == [1.0, 1.5]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1"])
def test_numbers_of_clients_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="--clients"):
        numbers(text, "--clients")


def test_a_round_lasts_from_its_first_clients_beginning_to_its_last_ones_end() -> None:
    """Of clients that take turns as of those that train at the same time; in any order."""
    turns = [{"at": 5.0, "took": 2.0}, {"at": 1.0, "took": 2.0}, {"at": 3.0, "took": 1.5}]
    together = [{"at": 1.0, "took": 4.0}, {"at": 2.0, "took": 1.0}]
    assert [_span(rows, "at", "took") for rows in (turns, together)] == [6.0, 4.0]


def test_all_processes_over_rpc_know_their_rank(tmp_path: Path) -> None:
    _, over = TRANSPORTS["SFL over rpc"]
    server, *clients = over(Plan(2, ["--rounds", "3"], ["--threads", "2"], tmp_path))
    assert server[-2:] == ["--rounds", "3"]
    port = server[server.index("--port") + 1]
    for k, command in enumerate(clients):
        assert f"rpc://127.0.0.1:{port}/{k + 1}/3" in command
        assert command[-4:] == ["--client-id", str(k), "--threads", "2"]


@pytest.mark.slow
def test_a_step_is_one_round_trip_and_little_more_than_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = {"absent": ("none", "no_such_package"), BARE: turns.PEERS[BARE]}
    monkeypatch.setattr(turns, "PEERS", peers)
    over = {title: TRANSPORTS[title] for title in ("SFL over wss", "SFL over mpi")}
    monkeypatch.setattr(turns, "TRANSPORTS", over)
    over = {title: way for title, way in over.items() if find_spec(way[0])}
    options = ["--rows", "mlp-128-1", "--blocks", "1", "--steps", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *options])
    bench.main()
    rows = {
        row["contender"]: row
        for row in csv.DictReader((tmp_path / "bench.csv").read_text().splitlines())
    }
    assert list(rows) == [turns.ALONE, *turns.ARCHIVES, *over, BARE]
    labels, cut = torch.zeros(128, dtype=torch.int64), torch.zeros(128, 128)
    assert float(rows[BARE]["bytes"]) == COUNT.size + labels.nbytes + 2 * cut.nbytes
    files = len(encode(labels)) + 2 * len(encode(cut))
    for title in [*turns.ARCHIVES, *over]:
        assert float(rows[title]["round_trips"]) == 1.0
        assert files < float(rows[title]["bytes"]) <= 1.02 * files
        assert float(rows[title]["ms"]) > 0
        assert float(rows[title]["cpu_ms"]) > 0
