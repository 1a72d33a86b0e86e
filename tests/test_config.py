"""Options: one definition for the command line, files and the wire."""

import dataclasses
import json
from pathlib import Path

import pytest

from sfl.archive.run_folder import options_record, to_json
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import ClientNode, NodeConfig, ServerNode, SimulationNode
from sfl.options import GROUPS, from_values, names_of, parse_options
from sfl.values import KeepTensors


def server_options(*argv: str) -> tuple[RunConfig, ServerNode]:
    return parse_options(list(argv), RunConfig, ServerNode, prog="p", about="")


def client_options(*argv: str) -> ClientNode:
    return parse_options(list(argv), ClientNode, prog="p", about="")[0]


# design.md fixes these names; the rest are free.
FIXED_RUN = [
    "scheme", "model", "cut", "task", "dataset", "partition", "clients", "rounds", "local-epochs",
    "batch-size", "optimizer", "lr", "seed", "keep-tensors", "weights", "aggregation-weights",
    "optimizer-state", "run",
]  # fmt: skip
FIXED_SERVER = ["host", "port", "device", "threads", "data-dir", "out"]
FIXED_CLIENT = ["server", "client-id", "device", "threads", "data-dir", "out"]


@pytest.mark.parametrize(
    ("names", "group"),
    [(FIXED_RUN, RunConfig), (FIXED_SERVER, ServerNode), (FIXED_CLIENT, ClientNode)],
)
def test_the_fixed_options_exist_and_are_documented(names: list[str], group: type) -> None:
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(group)}
    assert set(names) <= fields.keys()
    assert all(len(field.metadata["help"]) > 10 for field in fields.values())


def test_the_help_shows_each_option_in_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = " ".join(GROUPS.values()).split()
    known = {n for g in (RunConfig, ServerNode, ClientNode, SimulationNode) for n in names_of(g)}
    assert sorted(grouped) == sorted(known)
    with pytest.raises(SystemExit):
        server_options("--help")
    shown = capsys.readouterr().out
    titles = [line[:-1] for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == ["options", *GROUPS]
    assert shown.index("training:") < shown.index("--lr FLOAT") < shown.index("security:")
    assert "--cut CUT[,CUT...] " in shown


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('rounds = 7\nlr = 1\nbatch-size = 16\nhost = "::"\n')
    run, node = server_options("--config", str(tmp_path / "run.toml"), "--rounds", "9")
    assert (run.rounds, run.lr, run.batch_size, run.clients) == (9, 1.0, 16, 3)
    assert node.host == "::"


def test_one_file_serves_all_machines(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'threads = 2\n[run]\nrounds = 7\n[server]\nport = 9000\ndata_dir = "s"\n'
        '[client]\nserver = "a:9000"\ndata_dir = "c"\n'
    )
    run, node = server_options("--config", str(path))
    assert (run.rounds, node.port, node.data_dir, node.threads) == (7, 9000, "s", 2)
    client = client_options("--config", str(path))
    assert (client.server, client.data_dir, client.threads) == ("a:9000", "c", 2)


def test_a_recorded_configuration_runs_again_under_a_new_name(tmp_path: Path) -> None:
    run = RunConfig(rounds=4, lr=0.1, cut=3, run="first", seed=2**40)
    node = ServerNode(port=9000)
    (tmp_path / "config.json").write_bytes(to_json(options_record(run, node)))
    again = server_options("--config", str(tmp_path / "config.json"))
    assert again == (dataclasses.replace(run, run=""), node)


def test_a_run_configuration_survives_the_wire() -> None:
    run = RunConfig(lr=0.1 + 0.2, cut=None, run="r", partition="sizes:0.2,0.2,0.6")
    values = json.loads(json.dumps(dataclasses.asdict(run)))
    assert from_values(RunConfig, values, "the server's configuration") == run


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rounds = 'x'", "rounds = 'x' is not of type int"),
        ("rounds = true", "rounds = True is not of type int"),
        ("lr = 'x'", "not of type float"),
        ("ruonds = 3", "unknown option in .* 'ruonds'; did you mean rounds"),
        ("[run]\nruonds = 3", "did you mean rounds"),
        ("rounds = ", "run.toml: "),
        ("rounds = 0", "--rounds 0: must be at least 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        server_options("--config", str(tmp_path / "run.toml"))


@pytest.mark.parametrize(
    "argv",
    [
        "--rounds 0", "--clients 0", "--batch-size -1", "--lr 0", "--lr nan", "--lr inf",
        "--momentum 1", "--weight-decay -1", "--seed -1", "--optimizer-state never",
        "--aggregation-weights none", "--run ../up", "--run .hidden", "--run a/b", "--port 65536",
        "--threads 0", "--device tpu", "--keep-tensors every:0", "--keep-tensors some", "--rounds",
        "--round 3", "--peer-timeout 0", "stray",
    ],
)  # fmt: skip
def test_bad_options_are_refused(argv: str) -> None:
    with pytest.raises(ConfigError):
        server_options(*argv.split())


@pytest.mark.parametrize("argv", ["--client-id -1", "--connect-timeout nan", "--rounds 3"])
def test_bad_client_options_are_refused(argv: str) -> None:
    with pytest.raises(ConfigError):
        client_options(*argv.split())


def test_which_rounds_tensors_stay() -> None:
    kept = {
        text: [r for r in range(7) if KeepTensors.parse(text).records(r)]
        for text in ("all", "none", "every:3", "last")
    }
    everything = list(range(7))
    assert kept == {"all": everything, "none": [], "every:3": [0, 3, 6], "last": everything}
    texts = ("all", "none", "every:3", "every:4", "last")
    assert [KeepTensors.parse(text).num_kept(7) for text in texts] == [7, 0, 3, 2, 1]


def test_the_data_folder_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NodeConfig().data_path == Path("data")
    monkeypatch.setenv("SFL_DATA_DIR", "/elsewhere")
    assert NodeConfig().data_path == Path("/elsewhere")
    assert NodeConfig(data_dir="here").data_path == Path("here")
