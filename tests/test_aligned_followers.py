"""Own data that are aligned by ids, over a hop and at the server of a further task."""

from pathlib import Path

import numpy as np
import pytest

from sfl.config import RunConfig
from sfl.data.vertical import digests
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from tests.support.hospitals import OWN, write_hospitals
from tests.support.launch import Launcher, options_of, wait_for
from tests.support.parties import SERVER, Chain, follower_folders, replayed, weights_of_all
from tests.support.proxy import Proxy
from tests.support.weights import assert_equal

AT_HOP = OWN | {"topology": "extended-vanilla", "cut": "9,11", "batch_size": 200}
AT_TASKS = OWN | {"topology": "vertical-multi-task", "cut": "6", "tasks": "class,age"}


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    return write_hospitals(tmp_path / "own")


def simulated(folder: Path, hospitals: Path, **options: object) -> Path:
    node = NodeConfig(out=str(folder), data_dir=str(hospitals))
    return simulate(RunConfig(**options, run="r", keep_tensors="all"), node)


def own_weights(run: Path) -> dict[str, object]:
    """Return the last round's weights of each party by themselves, wherever they lie."""
    found = {n.rpartition("/")[2]: t for n, t in weights_of_all(run).items() if "_001.pt" in n}
    return {name: tensor for name, tensor in found.items() if "average" not in name}


CASES = [
    (AT_HOP, {"hop_1": "step.after_answer:5", "client_1": "front.after_update:5"}),
    (AT_HOP, {SERVER: "step.after_update:4"}),
    (AT_TASKS, {"task_age": "step.after_answer:5", "client_0": "trained.before_said:1"}),
    (AT_TASKS, {SERVER: "average.after:1", "task_age": "checkpoint.before_rename:2"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "crashes"), CASES)
def test_killed_parties_leave_the_weights_of_one_process(
    launcher: Launcher,
    hospitals: Path,
    tmp_path: Path,
    options: dict[str, object],
    crashes: dict[str, str],
) -> None:
    whole = simulated(tmp_path / "whole", hospitals, **options)
    num_hops, tasks = (1, []) if options is AT_HOP else (0, ["age"])
    of_server = [*options_of(options), "--run", "r"]
    of_clients = ["--data-dir", f"{hospitals}/client_{{k}}"]
    parties = Chain(launcher, num_hops, 2, of_server, [], tasks=tasks, of_clients=of_clients)
    run = parties.run(crashes)
    assert_equal(weights_of_all(run), weights_of_all(whole))
    for folder in (run, *follower_folders(run)):
        checked, models = replayed(folder, "")
        assert checked > 0
        assert models >= 2


def test_ids_pass_a_hop_sealed(launcher: Launcher, hospitals: Path, tmp_path: Path) -> None:
    of_server = [*options_of(AT_HOP), "--run", "r", "--rounds", 1]
    chain = Chain(launcher, 1, 2, of_server, [])
    chain.of_clients = ["--data-dir", f"{hospitals}/client_{{k}}"]
    proxy = Proxy(chain.ports[1])
    for name in (SERVER, "hop_1"):
        wait_for(chain.start(name), "listening")
    chain.first_port = proxy.port
    for name in ("client_0", "client_1"):
        chain.start(name)
    for program in chain.programs.values():
        program.ended_with(0)
    proxy.close()
    passed = b"".join(bytes(s) for c in proxy.connections for s in c.streams.values())
    known = [set(np.load(hospitals / f"client_{k}/data.npz")["ids"].tolist()) for k in (0, 1)]
    shared = known[0] & known[1]
    assert len(passed) > 2**20
    assert len(shared) > 500
    for name in known[0] | known[1]:
        assert digests([name]).numpy().tobytes() not in passed
        assert name.encode() not in passed


def test_clients_joined_at_a_hop_have_the_same_samples(hospitals: Path, tmp_path: Path) -> None:
    at_hop = simulated(tmp_path / "hop", hospitals, **AT_HOP)
    at_server = simulated(
        tmp_path / "server", hospitals, **AT_HOP | {"topology": "vertical", "cut": 9}
    )
    assert_equal(own_weights(at_hop), own_weights(at_server), at_least=6)


@pytest.mark.parametrize(("options", "tasks"), [(AT_HOP, []), (AT_TASKS, ["age"])])
def test_a_start_that_fails_for_the_data_is_tried_again_with_others(
    launcher: Launcher, hospitals: Path, options: dict[str, object], tasks: list[str]
) -> None:
    """The clients end with the reason, as without a hop; who follows stays, and takes the next."""
    own = hospitals / "client_1/data.npz"
    whole = own.read_bytes()
    arrays = dict(np.load(own))
    np.savez(own, ids=np.array([f"nobody {i}" for i in range(800)]), x=arrays["x"])
    parties = Chain(launcher, 0 if tasks else 1, 2, [*options_of(options)], [], tasks=tasks)
    parties.of_clients = ["--data-dir", f"{hospitals}/client_{{k}}"]
    for name in parties.names:
        program = parties.start(name)
        if not name.startswith("client"):
            wait_for(program, "listening")
    for name in (SERVER, "client_0", "client_1"):
        assert "no training sample has the same id" in parties.programs[name].ended_with(1)
    own.write_bytes(whole)
    for name in (SERVER, "client_0", "client_1"):
        parties.start(name)
    for program in parties.programs.values():
        program.ended_with(0)


def test_a_client_with_a_model_of_its_own_checks_over_a_hop(
    launcher: Launcher, hospitals: Path
) -> None:
    models = {"party_models": "mlp,lenet5", "label_client": 1}
    chain = Chain(launcher, 1, 2, [*options_of(AT_HOP | models)], [])
    for name in (SERVER, "hop_1"):
        wait_for(chain.start(name), "listening")
    chain.of_clients = ["--check", "--data-dir", f"{hospitals}/client_1"]
    client = chain.start("client_0")
    client.ended_with(0)
    assert "KeyError" not in client.out
