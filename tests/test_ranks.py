"""A server in several processes, ranks, trains what a server in one process trains."""

import platform
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import sfl.archive
from sfl.config import RunConfig
from sfl.conversation.join import client_join
from sfl.environment import FINGERPRINT
from sfl.errors import ConfigError, ProtocolError, Redirected, RunError
from sfl.model.structure import weights_checksum
from sfl.nodes import ServerNode
from sfl.runtime.access import Access
from sfl.runtime.group import common_past, share_of
from sfl.runtime.local_network import local_pair
from sfl.runtime.rank_store import meet
from sfl.runtime.recorded_run import load
from sfl.runtime.replay import check
from sfl.runtime.resume import open_past
from sfl.runtime.same_model import check_same_start
from sfl.runtime.share import Share
from sfl.runtime.torchrun import check_shared
from sfl.strategy.aggregate import fed_avg
from sfl.strategy.merge import Shared
from sfl.strategy.ranks import OneRank, block
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import run_blocking
from sfl.wire.link import ANY_ID
from sfl.wire.messages import MessageType
from tests.support.handshakes import TOKEN, token_file
from tests.support.launch import (
    TIMEOUT_S,
    Launcher,
    finish,
    options_of,
    send_signal,
    wait_for,
    was_killed,
)
from tests.support.ranks import (
    agent_store,
    kill_rank,
    start_ranks,
    torchrun,
    untimed_figures,
    weights_of_ranks,
)
from tests.support.runs import ALLOW, BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

MLP = {"model": "mlp", "batch_size": 100, "rounds": 2}
NORMED = {"model": BN_DROPOUT, "cut": 5, "batch_size": 200, "rounds": 2}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, NORMED | {"scheme": "sflv1", "clients": 3, "keep_tensors": "all"}),
        (3, MLP | {"scheme": "sflv3", "clients": 4, "optimizer_state": "keep"}),
        # Each round there is a rank without a client in it.
        (3, NORMED | {"scheme": "sflv1", "clients": 4, "participation": 0.5}),
        (2, MLP | {"scheme": "fl", "clients": 3, "optimizer_state": "keep", "participation": 0.7}),
        (1, MLP | {"scheme": "sflv1", "clients": 2, "topology": "u-shaped", "cut": "1,4"}),
    ],
)
def test_ranks_leave_the_weights_and_figures_of_one_process(
    launcher: Launcher, tmp_path: Path, size: int, options: dict[str, object]
) -> None:
    options = {"keep_tensors": "none"} | options
    clients = options["clients"]
    ranks = start_ranks(launcher, size, *options_of(options))
    own = launcher.client("--client-ids", f"0-{clients - 1}", *ALLOW)
    finish([*ranks, own])
    run, alone = launcher.folder / "server/r", simulated(tmp_path / "alone", **options)
    assert_equal(weights_of_ranks(run), weights(alone))
    shares = [run, *(run / f"rank_{r}" for r in range(1, size))]
    for share in shares:
        assert untimed_figures(share) == untimed_figures(alone)
    if options["keep_tensors"] == "all":
        replayed, whole = (
            [check(load(r, allow_import=BN_DROPOUT)) for r in runs] for runs in ([*shares], [alone])
        )
        assert [(r.checked, r.differ, r.models) for r in replayed] == [
            (whole[0].checked, 0, whole[0].models),
            (whole[0].checked * 2 // 3, 0, 0),
        ]


def test_a_rank_that_is_killed_is_restarted_and_resumes(launcher: Launcher, tmp_path: Path) -> None:
    options = MLP | {"scheme": "sflv1", "clients": 3, "optimizer_state": "keep", "rounds": 8}
    options |= {"keep_tensors": "none"}
    server = torchrun(launcher, 2, *options_of(options))
    try:
        own = launcher.client("--client-ids", "0-2")
        out = ""
        while "round 2/8" not in out:
            line = server.stdout.readline()
            assert line, out
            out += line
        kill_rank(server, 1)
        out += server.communicate(timeout=180)[0]
    finally:
        server.kill()
    assert server.returncode == 0, out
    assert "going on with round" in out
    own.ended_with(0)
    run, alone = launcher.folder / "server/r", simulated(tmp_path / "alone", **options)
    assert_equal(weights_of_ranks(run), weights(alone))
    assert untimed_figures(run) == untimed_figures(alone)


def test_clients_without_an_id_find_a_place_and_are_checked_there(launcher: Launcher) -> None:
    """With a token, which each rank asks for; one client is away while its rank waits."""
    token = ["--token-file", token_file(launcher.folder, TOKEN)]
    options = ["--clients", 3, "--rounds", 2, "--model", "mlp", "--keep-tensors", "none", *token]
    ranks = start_ranks(launcher, 2, *options)
    wait_for(ranks[0], "listening")
    checked = launcher.client("--client-id", 2, "--check", *token)
    checked.ended_with(0)
    assert f"127.0.0.1:{launcher.port + 1} answers" in checked.out
    refused = launcher.client("--client-id", 9, *token).ended_with(1)
    assert "--client-id 9: this run has the ids 0 to 2" in refused
    finish([*ranks, *(launcher.client(*token) for _ in range(3))])
    assert {line[:8] for line in ranks[1].out.splitlines()} == {"rank 1: "}
    assert "client_2 is ready" in ranks[1].out
    shown = [["round 2/2:" in rank.out, "the run lies in" in rank.out] for rank in ranks]
    assert shown == [[True, True], [False, False]]
    logs = [
        (launcher.folder / "server/r" / name).read_text()
        for name in ("server_log.txt", "rank_1/server_log.txt")
    ]
    assert [[f"client_{k} is ready" in log for k in range(3)] for log in logs] == [
        [True, False, False], [False, True, True],
    ]  # fmt: skip


def test_a_client_comes_back_while_its_rank_waits_for_another(
    launcher: Launcher, tmp_path: Path
) -> None:
    options = MLP | {"clients": 2, "keep_tensors": "none", "local_epochs": 4}
    ranks = start_ranks(launcher, 2, *options_of(options))
    first, slow = (launcher.client("--client-id", k) for k in range(2))
    log = launcher.folder / "server/r/server_log.txt"
    _wait_for(log.parent / "rank_1/server_log.txt", "client_1 is ready")
    send_signal(slow, signal.SIGSTOP)
    _wait_for(log.parent / "status.json", "evaluating")  # client_0 has trained: rank 0 waits
    first.process.kill()
    wait_for(ranks[0], "client_0 is away")
    again = launcher.client("--client-id", 0)
    wait_for(ranks[0], "client_0 is back")
    send_signal(slow, signal.SIGCONT)
    finish([*ranks, slow, again])
    alone = simulated(tmp_path / "alone", **options)
    assert_equal(weights_of_ranks(log.parent), weights(alone))


def test_a_rank_that_dies_after_the_last_round_is_restarted_and_ends(
    launcher: Launcher, tmp_path: Path
) -> None:
    options = MLP | {"clients": 2, "keep_tensors": "none"}
    store = agent_store()
    ranks = start_ranks(
        launcher, 2, *options_of(options), store=store, crash={1: "run.before_goodbye"}
    )
    own = launcher.client("--client-ids", "0-1")
    was_killed(ranks[1])
    ranks[0].ended_with(1)
    again = start_ranks(launcher, 2, *options_of(options), store=store)
    finish([*again, own])
    run = launcher.folder / "server/r"
    assert "all rounds are done" in (run / "rank_1/server_log.txt").read_text()
    log = (run / "server_log.txt").read_text()
    assert log.count("client_0 registered") == 2  # the first attempt has not let it go
    assert_equal(weights_of_ranks(run), weights(simulated(tmp_path / "alone", **options)))


def test_an_old_run_of_that_name_is_refused_by_every_attempt(launcher: Launcher) -> None:
    options = ["--clients", 2, "--rounds", 1, "--model", "mlp", "--keep-tensors", "none"]
    ranks = start_ranks(launcher, 2, *options, crash={1: "run.after_goodbye"})
    launcher.client("--client-ids", "0-1").ended_with(0)
    was_killed(ranks[1])
    assert "another process of the server has ended: see its log" in ranks[0].ended_with(1)
    assert not sfl.archive.open(launcher.folder / "server/r").lists("rounds.csv")  # unfinished
    store = agent_store()  # of another torchrun
    for _ in range(2):
        ranks = start_ranks(launcher, 2, *options, store=store)
        assert "a run r exists" in ranks[0].ended_with(2)
        ranks[1].ended_with(1)


def _wait_for(path: Path, text: str) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"no {text!r} in {path}"
        time.sleep(0.01)


FINE = {"run": "r", "clients": 4}


@pytest.mark.parametrize(
    ("run", "node", "size", "why"),
    [
        ({"run": ""}, {}, 2, "--run: .* a name"),
        ({"clients": 2}, {}, 3, "--clients 2: .* 3 processes need a client each"),
        ({"scheme": "sl"}, {}, 2, "--scheme sl: .* one after the other"),
        ({"scheme": "sflv2"}, {}, 2, "--scheme sflv2: .* share one copy"),
        ({"scheme": "sync-sgd"}, {}, 2, "--scheme sync-sgd: .* each update"),
        ({"scheme": "central"}, {}, 2, "--scheme central"),
        ({"topology": "vertical", "partition": "vertical"}, {}, 2, "--topology vertical"),
        ({"aggregation": "fedadam"}, {}, 2, "--aggregation fedadam"),
        ({"aggregation": "median"}, {}, 2, "--aggregation median"),
        ({"weights": "dir:w"}, {}, 2, "--weights dir:w"),
        ({"max_clients": 8, "partition": "own"}, {}, 2, "--max-clients 8"),
        ({}, {"role": "main"}, 2, "--role main"),
        ({}, {"on_missing": "skip"}, 2, "--on-missing skip"),
        ({}, {"transport": "rpc"}, 2, "--transport rpc"),
        ({}, {"serve": "r"}, 2, "--serve r"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    run: dict[str, object], node: dict[str, object], size: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{why}.*torchrun"):
        check_shared(Recipe.of(RunConfig(**FINE | run)), ServerNode(**node), size)


@pytest.mark.parametrize("scheme", ["sflv1", "sflv3", "fl"])
def test_what_ranks_can_share_is_not_refused(scheme: str) -> None:
    check_shared(Recipe.of(RunConfig(**FINE, scheme=scheme)), ServerNode(), 4)


class WithOther:
    """A group of two, of which the other gathers what the test says."""

    size, command = 2, ""

    def __init__(self, rank: int, *others: object) -> None:
        self.rank, self._others = rank, list(others)

    def gather(self, value: object) -> list[object]:
        return [value, self._others.pop(0)][:: -1 if self.rank else 1]


def test_a_run_goes_on_with_as_many_ranks_as_it_had_until_all_are_finished(tmp_path: Path) -> None:
    options = {"model": "mlp", "rounds": 1, "clients": 3, "keep_tensors": "none", "run": "r"}
    options |= {"batch_size": 100}
    recipe = Recipe.of(RunConfig(**options))
    past = open_past(simulated(tmp_path, **options), recipe.run)
    with pytest.raises(RunError, match=r"clients 0 to 2, .*would serve 1 to 2"):
        common_past(past, recipe, WithOther(1))
    whole = replace(
        past, checkpoints=[replace(past.files, about=past.files.about | {"own": {0: 1}})]
    )
    with pytest.raises(ConfigError, match="has done its 1 round"):
        common_past(whole, recipe, WithOther(0, "it has done them as well", [1]))
    kept = common_past(whole, recipe, WithOther(0, "", [1]))
    assert kept is not None
    assert kept.first_round == 1


def test_clients_are_sent_to_the_host_that_a_rank_advertises() -> None:
    here = platform.node()
    for host, theirs, wanted in (
        ("", here, ""), ("", "other", "other"), ("lab", here, "lab"), ("lab", "other", "lab"),
    ):  # fmt: skip
        places = share_of(WithOther(0, [theirs, host, 9000]), 8765, "").places
        assert places == [{"host": "", "port": 8765}, {"host": wanted, "port": 9000}]
    with pytest.raises(ConfigError, match=r"rank 1: its machine's name, 'my_m/x'.*--advertise"):
        share_of(WithOther(0, ["my_m/x", "", 9000]), 8765, "")


def test_ranks_start_from_the_same_weights() -> None:
    class Gathered(OneRank):
        """Ranks, of which the other has ``theirs``."""

        theirs: tuple[object, ...] = ()

        def gather(self, own: object, *packs: object) -> dict[int, object]:
            return {**own, 3: self.theirs}  # type: ignore[dict-item]

    ranks, said = Gathered(), []
    shared = {"front": Shared({"w": torch.ones(2)})}
    known = dict.fromkeys(FINGERPRINT, "1")

    def check(weights: torch.Tensor, torch_version: str) -> None:
        ranks.theirs = (
            {"front": weights_checksum({"w": weights})},
            known | {"torch": torch_version},
        )
        check_same_start(shared, known, ranks, ours=[0, 1, 2], say=said.append)

    check(torch.ones(2), "1")
    assert not said
    check(torch.ones(2), "2")
    assert "client_3 has torch 2 against 1 of that with client_0" in said[0]
    with pytest.raises(RunError, match=r"client_3 starts from other weights .*--init"):
        check(torch.tensor([1.0, 1.0000001]), "1")


def test_a_share_has_no_shares_of_its_own(tmp_path: Path) -> None:
    options = {"model": "mlp", "rounds": 1, "batch_size": 500, "keep_tensors": "all"}
    run = simulated(tmp_path / "a", **options)
    num_steps = len([*sfl.archive.open(run).steps()])
    shutil.copytree(run, tmp_path / "copy")
    for folder in (run / "rank_1", run / "rank_1/rank_1"):
        shutil.copytree(tmp_path / "copy", folder)
    assert len([*sfl.archive.open(run).steps()]) == 2 * num_steps


@pytest.mark.parametrize(("clients", "size"), [(3, 2), (8, 3), (5, 5), (100, 7)])
def test_every_client_has_one_rank_and_finds_it(clients: int, size: int) -> None:
    ids = list(range(0, 2 * clients, 2))
    blocks = [block(ids, r, size) for r in range(size)]
    assert [k for one in blocks for k in one] == ids
    assert min(map(len, blocks)) >= max(map(len, blocks)) - 1 > -1
    places = [{"host": "", "port": 9000 + r} for r in range(size)]
    for rank in range(size):
        share = Share(rank, size, places)
        for k in ids:
            theirs = next(r for r in range(size) if k in blocks[r])
            wanted = None if theirs == rank else places[theirs]
            assert share.elsewhere(k, ids, is_full=True) == wanted
        after = places[rank + 1] if rank + 1 < size else None
        assert share.elsewhere(ANY_ID, ids, is_full=True) == after
        assert share.elsewhere(ANY_ID, ids, is_full=False) is None
        assert share.elsewhere(1, ids, is_full=True) is None  # refused here: there is no such id


def test_a_sum_that_ranks_hand_on_has_the_additions_of_one_rank() -> None:
    """In float64, where another order of the same numbers gives other last bits."""
    drawn = torch.Generator().manual_seed(1)
    states = [{"w": torch.randn(1000, generator=drawn, dtype=torch.float64)} for _ in range(7)]
    weights, whole = [3, 1, 4, 1, 5, 9, 2], fed_avg(states, [3, 1, 4, 1, 5, 9, 2])["w"]
    handed_on: list[torch.Tensor] = []

    def pass_on(add: Callable[[torch.Tensor], None], sums: torch.Tensor) -> None:
        sums += handed_on.pop() if handed_on else 0
        add(sums)
        handed_on.append(sums.clone())

    for rank in range(3):
        ours = block(range(7), rank, 3)
        last = fed_avg([states[k] for k in ours], [weights[k] for k in ours], states[0], pass_on)[
            "w"
        ]
    assert torch.equal(last, whole)
    backwards = fed_avg(states[::-1], weights[::-1])["w"]
    assert not torch.equal(backwards, whole)


# How ranks find each other in torchrun's store


def test_ranks_meet_whatever_earlier_attempts_have_left_in_the_store() -> None:
    store, names = HashStore(), []
    with ThreadPoolExecutor() as threads:
        for _ in range(2):
            store.set("sfl/word_2", "of a process that was killed before it was answered")
            found = [*threads.map(lambda rank: meet(store, rank, 3, TIMEOUT_S), range(3))]
            assert len({*found}) == 1
            names.append(found[0])
    assert names[0] != names[1]


def test_a_rank_that_starts_again_while_others_are_awaited_is_answered() -> None:
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(meet, store, 0, 3, TIMEOUT_S)
        names = [meet(store, 1, 3, TIMEOUT_S) for _ in range(2)]
        assert not first.done()
        names.append(meet(store, 2, 3, TIMEOUT_S))
        assert {*names} == {first.result()}


@pytest.mark.parametrize(("rank", "named"), [(0, "1, 2"), (1, "0")])
def test_a_rank_that_does_not_come_is_named(rank: int, named: str) -> None:
    with pytest.raises(RunError, match=f"waited 0 s for rank {named}: start torchrun on every"):
        meet(HashStore(), rank, 3, 0.1)


# Where a server may send a client


@pytest.mark.parametrize(
    ("host", "port"),
    [("a/b", 1), ("a b", 1), ("user@host", 1), ("-x", 1), ("h:1", 1), ("h", 0), ("h", 65536)],
)
def test_a_client_is_sent_to_a_host_and_a_port_alone(host: str, port: int) -> None:
    server, client = local_pair(0)
    server.send_message_as_json(MessageType.GO_TO, content={"host": host, "port": port})
    with pytest.raises(ProtocolError, match="the server sends us to"):
        run_blocking(client_join(client, 0, {}, instance="0" * 32, heartbeat_s=1.0))


@pytest.mark.parametrize(
    ("first", "host", "then"),
    [
        ("10.0.0.2:8765", "", "10.0.0.2:9000"),
        ("server", "other", "other:9000"),
        ("[::1]:8765", "", "[::1]:9000"),
        ("wss://server:443/sfl/x", "", "wss://server:9000/sfl/x"),
        ("ws://server/", "fe80::2", "ws://[fe80::2]:9000/"),
    ],
)
def test_transport_and_path_stay_where_a_client_is_sent(first: str, host: str, then: str) -> None:
    tried = []

    def attempt(address: str) -> str:
        tried.append(address)
        if len(tried) == 1:
            raise Redirected(host, 9000)
        return address

    assert _follow(first, attempt) == then
    assert tried == [first, then]


def test_a_client_that_is_sent_round_in_circles_stops() -> None:
    def attempt(address: str) -> str:
        raise Redirected("", 9000)

    with pytest.raises(ProtocolError, match="sent us on 256 times"):
        _follow("server:8765", attempt)


def _follow(address: str, attempt: Callable[[str], str]) -> str:
    return Access(None, None).follow(address, attempt)  # type: ignore[arg-type]
