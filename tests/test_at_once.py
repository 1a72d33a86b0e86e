"""--at-once: of clients that each have a copy of the back, only so many train at the same time."""

import functools
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sfl.archive.spool import Spool
from sfl.config import RunConfig
from sfl.crash import VARIABLE
from sfl.errors import ConfigError
from sfl.model.segment import train_step
from sfl.model.topology import Holder
from sfl.nodes import ServerNode
from sfl.runtime import simulation as simulate
from sfl.runtime.server import serve
from sfl.strategy.order import RoundPlan
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES, Scheme
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from tests.support.launch import Launcher
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

CLIENTS, ROUNDS = 4, 2


def planned(at_once: int, scheme: str = "sflv1", **options: object) -> RoundPlan:
    run = RunConfig(run="r", scheme=scheme, clients=CLIENTS, **options)  # type: ignore[arg-type]
    split = SplitModel(Recipe.of(run, frozenset()), (1, 28, 28), 10)
    indices = split.recipe.scheme.backs_of(range(CLIENTS))
    backs = {b: split.segments(Holder.SERVER, torch.device("cpu")) for b in indices}
    for back in backs.values():
        back.start_round(0)
    spool = Spool(None, lambda: None)
    steps = dict.fromkeys(range(CLIENTS), 5)
    return RoundPlan(split.recipe, 0, steps, backs, spool=spool, at_once=at_once)


def test_who_has_no_room_waits_for_it() -> None:
    plan = planned(at_once=2)
    first, second, third, fourth = plan.order
    for client in (first, second):
        assert plan.turn_of(client)()
        plan.begin(client)
    assert not plan.turn_of(third)()
    assert plan.turn_of(first)()  # it was lost, and redoes its steps
    plan.release(first)
    assert plan.turn_of(third)()
    plan.begin(third)
    assert not plan.turn_of(fourth)()
    plan.drop(second)
    assert plan.turn_of(fourth)()


def test_all_who_wait_for_room_wait_for_the_same_thing() -> None:
    """So that a message costs no more when more of them wait."""
    plan = planned(at_once=1)
    assert plan.turn_of(0) == plan.turn_of(1)
    assert hash(plan.turn_of(0)) == hash(plan.turn_of(1))


def test_without_the_option_there_is_room_for_all() -> None:
    plan = planned(at_once=0)
    for client in plan.order:
        assert plan.turn_of(client)()
        plan.begin(client)


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_a_copy_that_rests_has_no_more_than_it_must_keep(state: str) -> None:
    plan = planned(at_once=1, optimizer_state=state)
    back = plan._backs[0].last
    recipe = Recipe.of(RunConfig(optimizer_state=state))
    shape = SplitModel(recipe, (1, 28, 28), 10).features_spec(8).shape
    train_step(back, torch.randn(shape), torch.zeros(8, dtype=torch.int64), Position("r", 0, 0, 0))
    back.update()
    before = weights_of(back.state())
    assert back.optimizer.state()
    plan.release(0)
    assert bool(back.optimizer.state()) == (state == "keep")
    assert all(p.grad is None for p in back.blocks.parameters())
    assert back._input is None
    assert weights_of(back.state()) == before


def test_in_a_relay_one_trains_at_a_time() -> None:
    plan = planned(at_once=0, scheme="sl")
    assert [plan.turn_of(client)() for client in plan.order] == [True] + [False] * (CLIENTS - 1)


def test_a_shared_back_does_not_rest() -> None:
    plan = planned(at_once=0, scheme="sflv2")
    plan.begin(plan.order[0])
    back = plan._backs[0].last
    for parameter in back.blocks.parameters():
        parameter.grad = torch.ones_like(parameter)
    back.update()
    plan.release(plan.order[0])
    assert back.optimizer.state()


def test_of_clients_in_groups_only_one_alone_has_a_back_that_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And with --at-once, clients of a group would wait for each other's steps for ever."""
    row = Scheme(source="-", back_of=lambda client: client % 3)
    monkeypatch.setitem(SCHEMES, "groups", row)
    plan = planned(at_once=0, scheme="groups")
    for back in plan._backs.values():
        for parameter in back.last.blocks.parameters():
            parameter.grad = torch.ones_like(parameter)
        back.last.update()
    for client in plan.order:
        plan.release(client)
    rested = [b for b, back in plan._backs.items() if not back.last.optimizer.state()]
    assert rested == [1, 2]  # back 0 has two of the four clients
    with pytest.raises(ConfigError, match="not every client has a copy of the back"):
        serve(RunConfig(scheme="groups", clients=CLIENTS), ServerNode(at_once=1, host="no.invalid"))


def weights_of(state: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in state.items()}


def run_one_by_one(launcher: Launcher, *options: object, crash: str = "") -> Path:
    server = launcher.server(
        "--clients", CLIENTS, "--run", "r", "--rounds", ROUNDS, "--batch-size", 64,
        "--at-once", 1, *options,
    )  # fmt: skip
    env = {VARIABLE: crash} if crash else {}
    clients = [launcher.client("--client-id", k, env=env if k == 2 else {}) for k in range(CLIENTS)]
    if crash:
        assert clients[2].wait() == -signal.SIGKILL
        clients[2] = launcher.client("--client-id", 2)
    for program in [server, *clients]:
        program.ended_with(0)
    return launcher.folder / "server" / "r"


@pytest.mark.slow
def test_one_by_one_they_compute_the_same(launcher: Launcher, tmp_path: Path) -> None:
    run = run_one_by_one(launcher)
    assert_equal(weights(run), weights(simulated(tmp_path / "simulated", clients=CLIENTS)))
    for round_index in range(ROUNDS):
        times = [
            sorted(
                path.stat().st_mtime_ns
                for path in run.glob(f"client_files/client_{k}/round_{round_index:03d}/*.pt")
            )
            for k in range(CLIENTS)
        ]
        assert all(len(of_client) > 10 for of_client in times)
        for one, following in pairwise(sorted(times)):
            assert one[-1] <= following[0]  # no step of the next before the last of this one


def test_a_run_in_which_few_train_at_once_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"clients": 3, "rounds": 2, "model": "mlp"}
    expected = weights(simulated(tmp_path / "all", **options))
    few = functools.partial(simulate.RoundOptions, at_once=1)
    monkeypatch.setattr(simulate, "RoundOptions", few)
    assert_equal(weights(simulated(tmp_path / "few", **options)), expected)


@pytest.mark.slow
def test_one_that_is_killed_in_its_turn_keeps_the_others_waiting(
    launcher: Launcher, tmp_path: Path
) -> None:
    run = run_one_by_one(launcher, crash="front.after_update:8")
    assert_equal(weights(run), weights(simulated(tmp_path / "simulated", clients=CLIENTS)))


def test_only_copies_can_wait_for_one_another(launcher: Launcher) -> None:
    server = launcher.server("--clients", 2, "--scheme", "sflv2", "--at-once", 1)
    assert "with sflv2 not every client has a copy of the back" in server.ended_with(2)
    fed = launcher.server("--role", "fed", "--at-once", 1)
    assert "--at-once: is for the main server" in fed.ended_with(2)
