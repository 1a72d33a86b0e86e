"""``--init``: a run starts from trained weights, and is in all else as any other run."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import sfl
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError
from sfl.model.portable import About, Portable, write_portable
from sfl.model.zoo import MODELS, build, model_spec
from sfl.nodes import SimulationNode
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from sfl.runtime.simulation import simulate
from sfl.runtime.start_weights import PRETRAINED, read_start
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES
from sfl.strategy.split_model import SplitModel
from tests.support.launch import Launcher, free_port
from tests.support.pairwise import pairwise
from tests.support.runs import ALLOW, BN_DROPOUT, RUN, go_on
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal, assert_same, joined

SHAPE = (1, 28, 28)
SEED = 3  # of the runs that start from others
ROWS = RUN | {"seed": SEED, "rounds": 2}
State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that others start from."""
    out = tmp_path_factory.mktemp("trained")
    return simulated(out, model=BN_DROPOUT, cut=6, seed=7, batch_size=200)


def drawn(seed: int = SEED) -> State:
    return build(model_spec(BN_DROPOUT), SHAPE, 10, seed=seed).state_dict()


def begun(out: Path, init: object, **options: object) -> Path:
    """Return a simulation that starts from these weights."""
    run = RunConfig(**ROWS | options)
    return simulate(run, SimulationNode(out=str(out), init=str(init)))


def line_of(options: Mapping[str, object]) -> list[object]:
    return [part for n, v in options.items() for part in ("--" + n.replace("_", "-"), v)]


def written(path: Path, state: State, part: str) -> Path:
    """Write weights as ``sfl-export --to torch`` does."""
    about = About(
        part=part, model=BN_DROPOUT, cuts=(6,), task="classification", input_shape=SHAPE,
        takes=SHAPE, mean=(0.0,), std=(1.0,), classes=tuple("0123456789"), run="r", seed=0,
        round=0, back_checksum="", sfl_version="0",
    )  # fmt: skip
    write_portable(path, Portable(state, about))
    return path


def front_of(state: State) -> State:
    """Return the weights of the first six blocks."""
    blocks = ("conv", "norm1")
    return {name: tensor for name, tensor in state.items() if name.startswith(blocks)}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "cut"), pairwise(SCHEMES, [6, "3,9"]))
def test_a_run_starts_from_the_last_weights_of_another(
    trained: Path, tmp_path: Path, scheme: str, cut: int | str
) -> None:
    run = begun(tmp_path, trained, scheme=scheme, cut=cut, rounds=1)
    assert_equal(joined(run, -1), joined(trained, 1))
    opened = sfl.open_run(run, allow_import=BN_DROPOUT)
    client = 0 if scheme == "sflv3" else None
    assert_equal(opened.model(round=-1, client=client).state_dict(), joined(trained, 1))
    assert replay.check(load(run)).findings == []
    record = json.loads((run / "config.json").read_text())
    checksum = read_start(str(trained), Recipe.of(RunConfig(**RUN))).checksum
    assert record["init"] == str(trained)
    assert record["init_checksum"] == opened.config.init_checksum == checksum
    said = f"starts from the weights of {trained} after round 2, checksum {checksum}\n"
    assert said in (run / "server_log.txt").read_text()


@pytest.mark.slow
def test_a_warm_start_is_ahead_of_a_cold_one(tmp_path: Path) -> None:
    options = {"model": "lenet5", "batch_size": 64, "rounds": 2}
    before = simulated(tmp_path / "before", **options)
    config = RunConfig(**options | {"rounds": 1, "seed": 5, "run": "r"})
    cold = sfl.simulate(config, out=str(tmp_path / "cold"))
    warm = sfl.simulate(config, init=before, out=str(tmp_path / "warm"))
    assert warm.rounds["test_acc"][0] > cold.rounds["test_acc"][0] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "freeze"), [("sflv1", "front"), ("sl", "front"), ("fl", ""), ("sflv3", "")]
)
def test_a_socket_run_equals_the_simulation(
    trained: Path, launcher: Launcher, tmp_path: Path, scheme: str, freeze: str
) -> None:
    options = {"scheme": scheme, "freeze": freeze}
    line = [*line_of(ROWS | options), "--init", trained]
    sockets = launcher.run(*line, client_options=ALLOW)
    one_process = begun(tmp_path / "one", trained, **options)
    assert_equal(all_weights(sockets), all_weights(one_process))
    assert_same(sockets, one_process)
    assert bytes_sent(sockets) == bytes_sent(one_process)
    own = json.loads((launcher.folder / "client/r/client_0/config.json").read_text())
    assert str(trained) not in json.dumps(own)


def bytes_sent(run: Path) -> list[list[str]]:
    rows = csv.DictReader((run / "rounds.csv").read_text().splitlines())
    found = [[value for name, value in row.items() if "bytes" in name] for row in rows]
    assert all(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("point", ["start.ready", "average.after:2"])
def test_a_run_that_was_killed_goes_on(
    trained: Path, launcher: Launcher, tmp_path: Path, point: str
) -> None:
    """Before its first checkpoint it reads the weights again; afterwards they may be gone."""
    copy = written(tmp_path / "start.pt", joined(trained), "whole")
    line = [*line_of(ROWS), "--init", copy, "--clients", 3]
    server = launcher.server(*line, env={"SFL_CRASH_AT": point})
    ends = [*ALLOW, "--reconnect-timeout", 0]
    clients = [launcher.client("--client-id", k, *ends) for k in range(3)]
    server.wait()
    for client in clients:
        client.wait()
    if point != "start.ready":
        copy.unlink()
    run = go_on(launcher)
    assert_equal(all_weights(run), all_weights(begun(tmp_path / "one", trained)))


@pytest.mark.slow
def test_two_servers_start_from_the_same_file(
    trained: Path, launcher: Launcher, tmp_path: Path
) -> None:
    file, port = written(tmp_path / "start.pt", joined(trained), "whole"), free_port()
    fed = launcher.fed("--port", port, "--init", file, *ALLOW)
    apart = ["--role", "main", "--fed-server", f"127.0.0.1:{port}", "--init", file]
    run = launcher.run(*line_of(ROWS), *apart, client_options=ALLOW)
    fed.ended_with(0)
    fronts = launcher.folder / "fed" / "r"
    both = [joined(run, r) | joined(fronts, r) for r in (-1, 1)]
    one_process = begun(tmp_path / "one", trained)
    for ours, r in zip(both, (-1, 1), strict=True):
        assert_equal(ours, joined(one_process, r))


def test_a_file_of_one_part_leaves_the_rest_to_the_seed(trained: Path, tmp_path: Path) -> None:
    """Even if the run is cut elsewhere."""
    front = front_of(joined(trained))
    file = written(tmp_path / "front.pt", front, "front")
    run = begun(tmp_path, file, cut="2,9", rounds=1)
    assert_equal(joined(run, -1), {**drawn(), **front})
    log = (run / "server_log.txt").read_text()
    assert "drawn from the seed: norm2, fc1, norm3, fc2\n" in log


def test_a_vertical_run_takes_a_back_and_its_clients_draw_their_fronts(tmp_path: Path) -> None:
    options = {"topology": "vertical", "partition": "vertical", "model": "mlp", "clients": 2}
    before = simulated(tmp_path / "before", **options)
    back = torch.load(before / "models/server_model_001.pt", weights_only=True)
    file = written(tmp_path / "back.pt", back, "back")
    more = options | {"cut": None, "rounds": 1}
    run = begun(tmp_path / "run", file, **more)
    assert_equal(joined(run, -1), back, at_least=4)
    opened = sfl.open_run(run)
    cold = sfl.open_run(begun(tmp_path / "cold", "", **more))
    fronts = [r.front(round=-1, client=1).state_dict() for r in (opened, cold)]
    assert_equal(*fronts, at_least=2)
    front = written(tmp_path / "front.pt", fronts[0], "front")
    with pytest.raises(ConfigError, match=r"they have fc1.weight, which is none of the weights"):
        begun(tmp_path / "refused", front, **more)


def strange(state: State, name: str) -> State:
    """Return weights in which one of these things is wrong."""
    first = next(iter(state))
    return {
        "another model": {"conv9.weight": torch.zeros(3), **state},
        "shape": {**state, "fc2.bias": torch.zeros(7)},
        "type": {**state, "fc2.bias": torch.zeros(10, dtype=torch.float64)},
        "lacks": {n: t for n, t in state.items() if n != "norm3.running_var"},
        "NaN": {**state, first: state[first] * float("nan")},
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("another model", "they have conv9.weight, which is none of the weights"),
        ("shape", "fc2.bias is [7] float32, and the model's is [10] float32"),
        ("type", "fc2.bias is [10] float64, and the model's is [10] float32"),
        ("lacks", "they lack norm3.running_var"),
        ("NaN", "conv.weight holds NaN"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    trained: Path, tmp_path: Path, name: str, said: str
) -> None:
    for part in ("whole", "back"):
        file = written(tmp_path / f"{part}.pt", strange(joined(trained), name), part)
        with pytest.raises(ConfigError) as error:
            begun(tmp_path / "out", file)
        expected = f"--init: the weights in {file} ({part}) do not fit this run's model: {said}"
        assert str(error.value).startswith(expected)
    assert not (tmp_path / "out").exists()


def test_a_tied_tensor_has_one_value(tmp_path: Path) -> None:
    tied = "tests.support.odd_models:frozen"
    state = dict(build(model_spec(tied), SHAPE, 10, seed=0).state_dict())
    file = written(tmp_path / "w.pt", state | {"7.bias": state["7.bias"] + 1}, "whole")
    with pytest.raises(ConfigError, match=r"7.bias is 5.bias in the model, and has a value of its"):
        begun(tmp_path, file, model=tied, cut=5)


def test_what_is_no_start_is_refused(trained: Path, tmp_path: Path) -> None:
    own_fronts = simulated(tmp_path / "own", scheme="sflv3", model="mlp", rounds=1)
    hop = {"topology": "multi-hop", "cut": "2,3"}
    over_hop = simulated(tmp_path / "hop", model="mlp", rounds=1, **hop)
    (tmp_path / "junk").write_bytes(b"junk")
    for init, said in [
        (tmp_path / "nowhere", "there is no such run or file; give a run's folder"),
        (tmp_path / "junk", "junk"),
        (tmp_path, "is no folder of a run"),
        (own_fronts, "has no weights of the front, which each client or a fed server keeps"),
        (over_hop, "has no weights of the hop_1, which a hop keeps; give a file of sfl-export"),
        (written(tmp_path / "empty.pt", {}, "front"), r"the file holds no weights \(of the front"),
        (PRETRAINED, f"there are none for --model {BN_DROPOUT}"),
    ]:
        with pytest.raises((ConfigError, RunError, sfl.errors.IntegrityError), match=said):
            begun(tmp_path / "out", init)
    with pytest.raises(ConfigError, match=r"--init-checksum 0123: --init .* has [0-9a-f]{16};"):
        begun(tmp_path / "out", trained, init_checksum="0123")
    with pytest.raises(ConfigError, match=r"--init-checksum 0123: there is no --init"):
        begun(tmp_path / "out", "", init_checksum="0123")


def test_a_run_that_goes_on_keeps_its_start(trained: Path, launcher: Launcher) -> None:
    run = begun(launcher.folder, trained, rounds=1)
    server = launcher.server("--resume", run, "--rounds", 2, "--init", "elsewhere")
    assert f"--init elsewhere: the run has {trained}" in server.ended_with(2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache, empty, of a machine without internet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    folder = tmp_path / "hub/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_pretrained_weights_start_all_but_the_last_layer(hub: Path) -> None:
    from torchvision import models

    network = models.resnet18()
    torch.save(network.state_dict(), hub / "resnet18-f37072fd.pth")
    recipe = Recipe.of(RunConfig(model="resnet18"))
    start = read_start(PRETRAINED, recipe)
    for classes, is_fresh in ((10, True), (1000, False)):
        split = SplitModel(recipe, (3, 32, 32), classes)
        initial = {"all": {n: t for s in split.initial(*set(recipe.segments.values())).values()
                           for n, t in s.items()}}  # fmt: skip
        made = start.into(split, initial)["all"]
        theirs = [t for n, t in network.state_dict().items() if not n.startswith("fc.")]
        ours = [t for n, t in made.items() if not n.startswith("fc.")]
        assert all(map(torch.equal, ours, theirs))
        assert len(ours) == len(theirs)
        given = network.fc.weight.detach()
        assert torch.equal(made["fc.weight"], initial["all"]["fc.weight"] if is_fresh else given)
        assert ("drawn from the seed: fc" in start.line(split)) == is_fresh
    with pytest.raises(ConfigError, match=r"conv1.weight is \[64, 3, 7, 7\] float32, and the mod"):
        start.into(SplitModel(recipe, SHAPE, 10), {})


def test_without_internet_pretrained_weights_are_asked_for_in_a_line(hub: Path) -> None:
    recipe = Recipe.of(RunConfig(model="resnet18"))
    for data in (None, b"junk"):
        if data:
            (hub / "resnet18-f37072fd.pth").write_bytes(data)
        with pytest.raises(RunError) as error:
            read_start(PRETRAINED, recipe)
        said = str(error.value)
        assert said.startswith("--init pretrained: cannot load https://")
        assert f"bring that file to {hub}" in said
        assert "\n" not in said


def test_every_model_of_torchvision_has_pretrained_weights() -> None:
    from torchvision import models

    with_some = {name for name, spec in MODELS.items() if spec.pretrained}
    assert with_some == set(MODELS) & set(models.list_models())
