"""Vertically partitioned data: all clients take part in each step, each with its columns."""

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.hostile.memory import no_checks
from sfl.config import RunConfig
from sfl.conversation.alignment import (
    client_receive_order,
    server_receive_ids,
    server_send_order,
)
from sfl.conversation.join import Welcome, client_join, server_join
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.report import DataReport, disagreeing_clients
from sfl.crash import VARIABLE
from sfl.data.client_data import ClientData
from sfl.data.datasets import dataset_spec
from sfl.data.private_data import load_own
from sfl.data.vertical import align, digests, rows_of
from sfl.environment import fingerprint
from sfl.errors import ConfigError, DataError, IntegrityError, ProtocolError, RunError, SflError
from sfl.files.torch_file import TensorSpec, encode
from sfl.model.fusion import Joint
from sfl.nodes import ClientNode, NodeConfig
from sfl.runtime.client_process import recipe_of
from sfl.runtime.local_network import Away, local_pair
from sfl.runtime.preflight import check_run
from sfl.runtime.recorded_run import load
from sfl.runtime.replay import check
from sfl.runtime.simulation import check_away, simulate
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.wire.link import ANY_ID
from sfl.wire.messages import MessageType
from tests.support.hospitals import OWN, some_digits, write_hospitals, write_own
from tests.support.launch import Launcher, wait_for
from tests.support.pairwise import pairwise
from tests.support.plain_training import data_of
from tests.support.plain_vertical import PlainVertical
from tests.support.proxy import UP, Recorded
from tests.support.runs import ALLOW, BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal
from tests.support.wiretap import record

VERTICAL = {"topology": "vertical", "partition": "vertical", "clients": 2}
SEVERAL = {"topology": "vertical-multi-task", "tasks": "class,age", "cut": 6}
MODEL = {"model": BN_DROPOUT, "cut": 6, "batch_size": 200, "rounds": 2}
SCHEMES = ["sl", "sflv1", "sflv2", "sflv3"]


def last_weights(run: Path, num_clients: int, round_index: int = 1) -> dict[str, Tensor]:
    """Return the weights after a round: those of each client's folder, and of all servers."""
    mark = f"{round_index:03d}.pt"
    of_tasks = {path.parent.name: path for path in run.parent.parent.glob("task_*/r")}
    files = {
        name: folder / f"models/server_model_{mark}"
        for name, folder in {"server": run, **of_tasks}.items()
    } | {
        f"client_{k}": run.parent.parent / f"client/r/client_{k}/models/client_{k}_{mark}"
        for k in range(num_clients)
    }
    return {
        f"{party}/{name}": tensor
        for party, path in files.items()
        for name, tensor in torch.load(path, weights_only=True).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "fusion", "state", "clients", "label"),
    pairwise(SCHEMES, ["concat", "sum", "mean", "max"], ["reset", "keep"], [2, 4], [0, 1]),
)
def test_all_parties_together_equal_a_plain_loop(
    tmp_path: Path, scheme: str, fusion: str, state: str, clients: int, label: int
) -> None:
    """With BatchNorm and dropout at each party, and of whatever scheme: each owns its segment."""
    options = VERTICAL | MODEL | {"clients": clients, "fusion": fusion}
    options |= {"optimizer_state": state, "label_client": label, "scheme": scheme}
    run = simulated(tmp_path, **options)
    plain = PlainVertical(RunConfig(**options))
    plain.train()
    assert_equal(last_weights(run, clients), plain.weights())


def test_the_servers_of_several_tasks_equal_a_plain_loop(tmp_path: Path) -> None:
    """Of which each has a fusion of its own, and all weigh their losses."""
    options = MODEL | VERTICAL | {"topology": "vertical-multi-task", "tasks": "class,parity"}
    options |= {"optimizer_state": "keep", "label_client": 1, "task_weights": "1,0.3"}
    run = simulated(tmp_path, **options)
    plain = PlainVertical(RunConfig(**options))
    plain.train()
    assert_equal(last_weights(run, 2), plain.weights(), at_least=20)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "cut"), [("lenet5", 3), ("cnn-mnist", 3)])
def test_activations_with_channels_are_joined_along_them(
    tmp_path: Path, model: str, cut: int
) -> None:
    options = VERTICAL | MODEL | {"model": model, "cut": cut}
    run = simulated(tmp_path, **options)
    plain = PlainVertical(RunConfig(**options))
    plain.train()
    assert_equal(last_weights(run, 2), plain.weights(), at_least=8)


def options_of(options: Mapping[str, object]) -> list[object]:
    return [text for n, v in options.items() for text in (f"--{n.replace('_', '-')}", v)]


@pytest.mark.parametrize(("scheme", "state"), [("sl", "keep"), ("sflv1", "reset")])
def test_sockets_equal_the_simulation_and_the_replay(
    launcher: Launcher, tmp_path: Path, scheme: str, state: str
) -> None:
    options = VERTICAL | MODEL | {"scheme": scheme, "optimizer_state": state, "clients": 3}
    typed = options_of({n: v for n, v in options.items() if n != "clients"})
    sockets = launcher.run(*typed, clients=3, client_options=ALLOW)
    whole = simulated(tmp_path / "simulated", **options, keep_tensors="all")
    assert_equal(all_weights(sockets), all_weights(whole))
    files = {p.relative_to(whole) for p in whole.glob("client_files/**/*.pt")}
    assert len(files) == 2 * 16 * (3 * 2 + 1)  # rounds, steps, two tensors of each, labels of one
    assert all((whole / p).read_bytes() == (sockets / p).read_bytes() for p in files)
    report = check(load(sockets, allow_import=BN_DROPOUT))
    assert (report.findings, report.checked, report.differ) == ([], 2 * 16 * 3, 0)
    assert (report.models, report.models_differ) == (2, 0)
    one = check(load(sockets, allow_import=BN_DROPOUT), client=2)
    assert (one.findings, one.checked, one.differ) == ([], 2 * 16, 0)


@pytest.mark.slow
def test_a_missing_party_counts_as_zeros_until_it_is_back(tmp_path: Path) -> None:
    """It goes on with what it had at the start of the round in which it was lost."""
    options = VERTICAL | MODEL | {"clients": 3, "rounds": 3, "run": "r"}
    config, node = RunConfig(**options), NodeConfig(out=str(tmp_path))
    run = simulate(config, node, [Away(client=2, round=0, step=3, back=2)])
    plain = PlainVertical(config)
    began = {name: t.clone() for name, t in plain.fronts[2].state_dict().items()}

    def missing(round_index: int, step: int) -> list[int]:
        if (round_index, step) == (0, 3):
            plain.fronts[2].load_state_dict(began)
        return [2] if round_index == 1 or (round_index == 0 and step >= 3) else []

    plain.train(missing)
    assert_equal(last_weights(run, 3, 2), plain.weights())
    report = check(load(run, allow_import=BN_DROPOUT))
    assert (report.findings, report.differ, report.models_differ) == ([], 0, 0)
    assert report.checked == 2 * 3 * 16 + 3 + 16  # of two clients, and what the third took part in
    missed = [row.rsplit(",", 1)[1] for row in (run / "rounds.csv").read_text().splitlines()]
    assert missed == ["missing", "client_2: away", "client_2: away", ""]


@pytest.mark.slow
def test_over_sockets_a_round_goes_on_without_a_party_if_told_so(
    launcher: Launcher, tmp_path: Path
) -> None:
    skip = ["--on-missing", "skip", "--round-timeout", 3, "--min-clients", 1, "--rounds", 6]
    options = options_of({n: v for n, v in (VERTICAL | MODEL).items() if n != "rounds"})
    server = launcher.server("--run", "r", *options, *skip)
    lost = launcher.client("--client-id", 1, *ALLOW, env={VARIABLE: "front.after_update:20"})
    other = launcher.client("--client-id", 0, *ALLOW)
    assert lost.wait() == -signal.SIGKILL
    for program in [server, other]:
        program.ended_with(0)
    report = check(load(tmp_path / "server/r", allow_import=BN_DROPOUT))
    assert (report.findings, report.differ, report.models_differ) == ([], 0, 0)
    assert report.checked == 6 * 16 + 20
    table = (tmp_path / "server/r/rounds.csv").read_text()
    missed = [row.rsplit(",", 1)[1] for row in table.splitlines()]
    assert missed[1].strip() == ""
    assert all("client_1" in text for text in missed[2:])


@pytest.mark.slow
def test_a_joint_step_that_fails_ends_the_run_and_blames_nobody(launcher: Launcher) -> None:
    options = options_of(VERTICAL | {"model": "mlp", "lr": 1e12, "optimizer": "sgd"})
    server = launcher.server("--run", "r", *options)
    for k in (0, 1):
        launcher.client("--client-id", k)
    assert "of all clients fails: the results of step" in server.ended_with(1)


def test_the_client_with_the_labels_is_waited_for() -> None:
    recipe = Recipe.of(RunConfig(**VERTICAL, label_client=1))
    check_away(recipe, [Away(0, 1)])
    with pytest.raises(ConfigError, match="all steps need the labels of client_1"):
        check_away(recipe, [Away(1, 1)])


# Own data, aligned by ids


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    return write_hospitals(tmp_path / "own")


@pytest.mark.parametrize("way", ["processes", "one host", "killed server"])
def test_samples_of_different_kinds_are_joined_by_their_ids(
    launcher: Launcher, hospitals: Path, tmp_path: Path, way: str
) -> None:
    """Sockets, simulation and the samples that both have: whatever the order of their files."""
    node = NodeConfig(out=str(tmp_path), data_dir=str(hospitals))
    run, sockets = simulate(RunConfig(**OWN, run="r"), node), tmp_path / "server/s"
    crash = {VARIABLE: "step.after_update:7"} if way == "killed server" else {}
    server = launcher.server("--run", "s", *options_of(OWN), env=crash)
    data = [["--client-id", k, "--data-dir", hospitals / f"client_{k}"] for k in (0, 1)]
    if way == "one host":
        data = [["--client-ids", "0-1", "--data-dir", hospitals]]
    own = [launcher.client(*options) for options in data]
    if crash:
        assert server.wait() == -signal.SIGKILL
        server = launcher.server("--resume", sockets)
    for program in [server, *own]:
        program.ended_with(0)
    assert_equal(all_weights(sockets), all_weights(run))
    assert (check(load(run)).differ, check(load(sockets)).differ) == (0, 0)
    assert (sockets / "server_log.txt").read_text().count("client_0 registered") == 1 + bool(crash)
    shared = people(hospitals / "client_0") & people(hospitals / "client_1")
    log = (run / "rounds/round_000.csv").read_text()
    held_out = len(shared) // 5
    assert f"0,client_model_000.pt,samples,{len(shared) - held_out}" in log
    assert f"1,client_model_000.pt,samples,{len(shared) - held_out}" in log


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"cut": 3}, {"cut": 9}, SEVERAL])
def test_activations_of_different_shapes_are_joined_as_in_a_plain_loop(
    hospitals: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    """Convolved images, or a vector of them, beside the vector of a table."""
    config = RunConfig(**OWN | {"batch_size": 200} | options, run="r")
    run = simulate(config, NodeConfig(out=str(tmp_path), data_dir=str(hospitals)))
    plain = PlainVertical(config, aligned(hospitals, config.seed))
    plain.train()
    assert_equal(last_weights(run, 2), plain.weights())


def aligned(folder: Path, seed: int) -> list[ClientData]:
    data = of_hospitals(folder)
    order = align({k: one.identified.ids for k, one in data.items() if one.identified}, seed)
    return [one.aligned(order, drawn_as=0) for one in data.values()]


def people(folder: Path) -> set[str]:
    return set(np.load(folder / "data.npz")["ids"].tolist())


def of_hospitals(folder: Path) -> dict[int, ClientData]:
    spec, run = dataset_spec("mnist-5k"), RunConfig(**OWN)
    return {
        k: load_own(spec, run, k, folder / f"client_{k}", say=lambda line: None, has_ids=True)
        for k in (0, 1)
    }


def test_aligned_samples_are_the_same_peoples_in_the_same_order(hospitals: Path) -> None:
    images, table = aligned(hospitals, seed=3)
    for part in ("train", "validation"):
        x = getattr(images, part).x.flatten(1)[:, ::7]
        assert len(x) > 100
        assert torch.equal(getattr(table, part).x, x.float() / 128 - 1)
    assert not table.train.y.any()
    assert images.train.y.any()
    other, _ = aligned(hospitals, seed=4)
    assert other.train.x.sum() + other.validation.x.sum() == (
        images.train.x.sum() + images.validation.x.sum()
    )
    assert not torch.equal(other.train.x, images.train.x)


def test_other_ids_are_other_data(hospitals: Path) -> None:
    """With ids that stand at other rows, the client would train on other samples."""
    run = RunConfig(**OWN)
    before = DataReport.of(of_hospitals(hospitals)[1], run).digest
    path = hospitals / "client_1/data.npz"
    arrays = dict(np.load(path))
    np.savez(path, ids=arrays["ids"][::-1], x=arrays["x"])
    assert DataReport.of(of_hospitals(hospitals)[1], run).digest != before


def test_ids_that_are_missing_or_twice_are_named(tmp_path: Path) -> None:
    x, y = some_digits(10)
    write_own(tmp_path / "twice/client_0", [*range(9), 3], x=x, y=y)
    write_own(tmp_path / "twice/client_1", [*range(9)], x=x)
    with pytest.raises(DataError, match="'patient 3' occurs more than once"):
        of_hospitals(tmp_path / "twice")
    write_own(tmp_path / "few/client_0", [*range(10)], x=x, y=y)
    write_own(tmp_path / "few/client_1", [*range(9)], x=x)
    with pytest.raises(DataError, match="an array ids that names each sample of x, of 10"):
        of_hospitals(tmp_path / "few")
    with pytest.raises(DataError, match=r"same id at all clients \(client_0 1, client_1 2\)"):
        align({0: {"train": digests(["a"])}, 1: {"train": digests(["b", "c"])}}, 0)


def test_clients_without_common_samples_end_before_the_start(tmp_path: Path) -> None:
    x, y = some_digits(20)
    write_own(tmp_path / "own/client_0", [*range(10)], x=x[:10], y=y[:10])
    write_own(tmp_path / "own/client_1", [*range(10, 20)], x=x[10:])
    with pytest.raises(Exception, match="no training sample has the same id at all clients"):
        simulate(RunConfig(**OWN), NodeConfig(out=str(tmp_path), data_dir=str(tmp_path / "own")))


# Who is lost, and comes back


def test_what_a_lost_client_has_given_is_taken_back() -> None:
    """It gives it again over its new connection: nobody waits at the end of the old one."""
    sample = TensorSpec((4,), torch.float32)
    steps: JointSteps[str] = JointSteps(Joint({0: sample, 1: sample}), leader=0)
    at, z = Position("r", 0, 3, 0), torch.ones(2, 4)
    leader, other = (steps.of("train", at._replace(client=k)) for k in (0, 1))
    lost = other.contribute("old", z)
    next(lost)
    taking = leader.give_and_take("leader's", z)
    assert next(taking)() is True
    lost.close()
    assert leader.all_given() is False
    again = other.contribute("new", z)
    next(again)
    with pytest.raises(StopIteration) as taken:
        next(taking)
    assert [given.end for given in taken.value.value.values()] == ["leader's", "new"]
    leader.finish("done")
    late = other.contribute("late", z)  # repeats what is done
    with pytest.raises(StopIteration, match="done"):
        next(late)


@pytest.mark.slow
def test_a_run_that_is_over_does_not_wait_for_the_labels(launcher: Launcher) -> None:
    server = launcher.server("--run", "r", *options_of(VERTICAL | MODEL | {"rounds": 1}))
    lost = launcher.client("--client-id", 0, *ALLOW, env={VARIABLE: "run.before_goodbye"})
    other = launcher.client("--client-id", 1, *ALLOW)
    assert lost.wait() == -signal.SIGKILL
    for program in [server, other]:
        program.ended_with(0)


@pytest.mark.slow
def test_a_resumed_run_does_not_begin_without_the_labels(
    launcher: Launcher, tmp_path: Path
) -> None:
    crash = {VARIABLE: "step.after_update:20"}
    server = launcher.server("--run", "r", *options_of(VERTICAL | MODEL), env=crash)
    own = [launcher.client("--client-id", k, *ALLOW) for k in (0, 1)]
    assert server.wait() == -signal.SIGKILL
    own[0].process.kill()
    own[0].process.join()
    skip = ["--on-missing", "skip", "--round-timeout", 3, "--min-clients", 1]
    server = launcher.server("--resume", tmp_path / "server/r", *skip)
    wait_for(server, "client_1 is ready")
    server.process.join(6)
    assert "of disk" not in server.out  # what it says when it begins
    own[0] = launcher.client("--client-id", 0, *ALLOW)
    for program in [server, *own]:
        program.ended_with(0)
    assert_equal(
        all_weights(tmp_path / "server/r"),
        all_weights(simulated(tmp_path / "s", **VERTICAL | MODEL)),
    )


def test_clients_with_other_numbers_of_samples_do_not_go_together() -> None:
    recipe = Recipe.of(RunConfig(**VERTICAL | {"clients": 3}))
    split = data_of(recipe.run)
    reports = {k: DataReport.of(part, recipe.run) for k, part in enumerate(split)}
    assert disagreeing_clients(reports, recipe) == {}
    fewer = {**reports[1].num_samples, "train": 3000}
    reports[1] = replace(reports[1], num_samples=fewer)
    assert disagreeing_clients(reports, recipe) == {
        1: "samples differ: client_1 has 3000 train, 800 validation, 1000 test,"
        " client_0 3200 train, 800 validation, 1000 test; all need the same ones, of which each has"
        " its part"
    }


def test_ids_are_asked_for_when_the_report_is_accepted() -> None:
    """So that nobody can announce more than the server would take."""
    server, client = local_pair(0)
    ours = {name: str(text) for name, text in fingerprint(torch.device("cpu")).items()}
    run = RunConfig(**OWN, run="r")
    report = replace(
        DataReport.of(data_of(RunConfig(clients=1))[0], run), structure=("0" * 16,), weights="0" * 8
    )
    talk = server_join(
        server, Welcome(ANY_ID, run, 0, heartbeat_s=10.0), lambda wanted, instance: 0, no_checks,
        claim_error=lambda joined: f"reports {joined.data.num_samples['train']} samples",
    )  # fmt: skip
    next(talk)
    next(client_join(client, 0, ours, instance="0" * 32, heartbeat_s=10.0))
    next(talk)
    content = json.loads(json.dumps(asdict(report)))  # as it would come over a socket
    client.send_message_as_json(MessageType.REQUEST_TO_START, content=content)
    with pytest.raises(ProtocolError, match="client_0 reports 3200 samples"):
        next(talk)
    assert server.limits.payload_bytes == {}


@pytest.mark.parametrize(
    ("names", "error", "why"),
    [
        (["a", "b", "a"], ProtocolError, "names a sample twice"),
        (["a", "b"], IntegrityError, "the ids of client_0"),
    ],
)
def test_ids_of_a_client_are_checked(names: list[str], error: type[SflError], why: str) -> None:
    server, client = local_pair(0)
    talk = server_receive_ids(server, {"train": 3})
    next(talk)
    ids = torch.cat([digests([name]) for name in names])
    client.send_file(MessageType.SAMPLE_IDS, encode(ids))
    with pytest.raises(error, match=why):
        next(talk)


def test_samples_that_a_server_names_are_checked() -> None:
    server, client = local_pair(0)
    own = {"train": digests(["a", "b"])}
    server_send_order(server, {"train": digests(["a", "b", "c"])})
    talk = client_receive_order(client, own)
    next(talk)
    with pytest.raises(ProtocolError, match="more than are here"):
        next(talk)
    with pytest.raises(DataError, match="ids of samples that are not here"):
        rows_of(digests(["c"]), own["train"])


def test_a_projection_that_is_too_large_is_refused_before_it_is_made() -> None:
    run = RunConfig(**VERTICAL | {"party_models": "lenet5,mlp"}, model="lenet5")
    models = {k: SplitModel(Recipe.of(run), (1, 28, 14), 10, client=k) for k in (0, 1)}
    with pytest.raises(ConfigError, match=r"projection of the clients' activations .* takes 0 MB"):
        models[0].join(models, most_bytes=1000)
    models[0].join(models, most_bytes=1e6)


def test_own_images_may_be_normalised_by_the_runs_figures(tmp_path: Path) -> None:
    x, y = some_digits(20)
    write_own(tmp_path / "client_0", [*range(20)], x=x.astype(np.float32) - 100, y=y)
    run = RunConfig(**OWN, normalize="mean=-60,std=80")
    spec = dataset_spec("mnist-5k")
    data = load_own(spec, run, 0, tmp_path / "client_0", say=lambda line: None, has_ids=True)
    assert len(data.train) == 20
    with pytest.raises(DataError, match="floats outside"):
        load_own(
            spec, replace(run, normalize=""), 0, tmp_path / "client_0",
            say=lambda line: None, has_ids=True,
        )  # fmt: skip


def test_a_single_common_sample_ends_the_run_before_the_start(tmp_path: Path) -> None:
    x, y = some_digits(20)
    write_own(tmp_path / "own/client_0", [*range(11)], x=x[:11], y=y[:11])
    write_own(tmp_path / "own/client_1", [*range(10, 20)], x=x[10:])
    with pytest.raises(RunError, match="a single training sample is at all clients"):
        simulate(RunConfig(**OWN), NodeConfig(out=str(tmp_path), data_dir=str(tmp_path / "own")))


def test_ids_of_a_part_that_is_not_there_are_refused(tmp_path: Path) -> None:
    x, y = some_digits(10)
    write_own(tmp_path / "client_0", [*range(10)], x=x, y=y, ids_test=np.array(["a"]))
    write_own(tmp_path / "client_1", [*range(10)], x=x)
    with pytest.raises(DataError, match="names each sample of x_test, of 0"):
        of_hospitals(tmp_path)


def test_a_client_that_has_no_labels_need_not_keep_them() -> None:
    run, node = RunConfig(**VERTICAL), ClientNode(keep_labels=True)
    assert not recipe_of(run, node, 1).withholds_labels
    with pytest.raises(ConfigError, match="--keep-labels"):
        recipe_of(run, node, 0)


def test_no_loss_of_a_single_sample_is_told() -> None:
    split = SplitModel(
        Recipe.of(RunConfig(**VERTICAL, model="mlp", batch_size=100)), (1, 28, 14), 10
    )
    assert list(split.evaluation_sizes(801)) == [100] * 7 + [101]
    assert split.largest_evaluation_batch == 101


# What is refused, and what passes on the wire


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scheme": "fl"}, "--scheme fl: must be a scheme with a cut"),
        ({"scheme": "central"}, "--scheme central: must be a scheme with a cut"),
        ({"partition": "iid"}, "--partition iid: must be vertical or own"),
        ({"participation": 0.5}, "--participation 0.5: must be all clients"),
        ({"label_client": 2}, "--label-client 2: must be one of the 2 clients"),
        ({"batch_size": 1}, "--batch-size 1: must be 2 or more"),
        ({"augment": "hflip"}, "--augment hflip: must be none"),
        ({"fusion": "glue"}, "fusion"),
        (
            {"topology": "vanilla", "partition": "iid", "fusion": "sum"},
            "--fusion sum: must be left out",
        ),
        ({"party_models": "mlp"}, "--party-models mlp: 1 models for 2 clients"),
        ({"cut": "3,6"}, "takes 1 cut"),
        ({"topology": "vanilla"}, "each client has samples of its own"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Recipe.of(RunConfig(**VERTICAL | options))


def test_activations_of_different_shapes_can_only_be_concatenated() -> None:
    run = RunConfig(**VERTICAL, fusion="sum", model="lenet5", party_models="lenet5,mlp")
    with pytest.raises(ConfigError, match="--fusion sum needs the same shape"):
        check_run(run)
    check_run(replace(run, fusion="concat"))


def raw_columns(connections: list[Recorded], data: list[ClientData]) -> int:
    """Return how many samples' raw columns went up, as bytes or as normalised floats."""
    streams = [bytes(connection.streams[UP]) for connection in connections]
    found = 0
    for part in data:
        x, _ = part.batch(part.train, slice(0, 50))
        forms = [*part.train.take(slice(0, 50)).x.numpy(), *x.numpy()]
        found += sum(form.tobytes() in stream for form in forms for stream in streams)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "leaks"), [(3, False), (1, True)])
def test_no_raw_column_leaves_a_client(tmp_path: Path, cut: int, leaks: bool) -> None:
    """In front of the first cut of this model there is no layer but ``flatten``."""
    options = {n: v for n, v in VERTICAL.items() if n != "clients"} | {"model": "mlp", "cut": cut}
    _, connections = record(tmp_path, 2, [*options_of(options), "--rounds", 1])
    found = raw_columns(connections, data_of(RunConfig(**VERTICAL)))
    assert (found > 0) == leaks
    with_labels = {
        connection.messages[0][1].content["client_id"]: any(
            m.type in (MessageType.TRAINING_LABELS, MessageType.VALIDATION_LABELS)
            for _, m in connection.messages
        )
        for connection in connections
    }
    assert with_labels == {0: True, 1: False}


def test_a_client_without_the_labels_has_none_of_a_data_set_that_is_cut_into_strips() -> None:
    ours, theirs = data_of(RunConfig(**VERTICAL))
    for part in ("train", "validation", "test"):
        assert getattr(ours, part).y.any()
        assert not getattr(theirs, part).y.any()
