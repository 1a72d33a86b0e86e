"""What a client may make a server hold, and a server a client: measured in real processes."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from experiments.hostile.insiders import Claim, Insider
from experiments.hostile.memory import (
    CLAIMS,
    GREEDY,
    SERVER,
    WISHES,
    gradients,
    peak_bytes,
    send_gradients,
    try_claim,
    try_greed,
    try_wish,
    zero_gradients,
)
from experiments.hostile.target import Target
from sfl.config import RunConfig
from sfl.conversation.limits import server_limits
from sfl.data.client_data import part_of
from sfl.data.datasets import DATASETS
from sfl.data.samples import Samples
from sfl.errors import ConfigError, ConnectionLost, ProtocolError
from sfl.model.metrics import checked, checked_steps
from sfl.runtime.memory import machine_memory_bytes, server_bytes, sizes_of
from sfl.runtime.report_limits import MOST_STEPS
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES, Scheme
from sfl.strategy.split_model import SplitModel
from sfl.transport import connection as transport
from sfl.transport.buffered import BufferedConnection
from sfl.transport.connection import Connection
from sfl.transport.guard import Terms
from sfl.transport.listener import listen
from sfl.transport.tcp_server import TcpServer
from sfl.values import parse_bytes
from sfl.wire.messages import Limits, MessageType
from tests.support.dial import dial
from tests.support.launch import Launcher, Program, wait_for
from tests.support.made_data import write_ham10000

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
RUN = ["--run", "r", "--peer-timeout", 15]
MIB = 2**20
Pair = tuple[TcpServer, BufferedConnection, Connection]
lost_after_1_s = pytest.mark.parametrize("pair", [1], indirect=True)


def started(launcher: Launcher, *options: object) -> tuple[Program, Target]:
    server = launcher.server(*options)
    wait_for(server, "listening")
    return server, Target("127.0.0.1", launcher.port)


def process_of(program: Program) -> int:
    assert program.process.pid
    return program.process.pid


# A client that does not read, or claims too much


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", GREEDY)
def test_a_client_that_takes_memory_gets_little(launcher: Launcher, name: str) -> None:
    greed = GREEDY[name]
    server, target = started(launcher, *greed.server, *RUN)
    grown, answer = try_greed(target, process_of(server), greed)
    assert grown < greed.bound_bytes, answer
    assert "250 of" not in answer


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A server's end of a connection, and the client's; parametrised by the peer's time-out."""
    timeout_s = getattr(request, "param", 60)
    limits = Limits(payload_bytes={MessageType.SEND_MODEL: 2**26})
    with (
        listen("127.0.0.1", 0) as listener,
        TcpServer(listener, Terms(timeout_s, limits)) as board,
        dial(f"127.0.0.1:{listener.port}", timeout_s=60, limits=limits,
            on_wait=print) as client,
    ):  # fmt: skip
        client.send_message_as_json(MessageType.REGISTER)
        (link,) = board.wait_until(board.ready_members, 5)
        link.receive_message_as_json(MessageType.REGISTER)
        link.peer_name, link.is_assigned = "client_0", True
        yield board, link, client


LARGE = bytes(40_000_000)  # far beyond the sockets' buffers


def came(board: TcpServer, link: BufferedConnection, number: int = 1) -> None:
    """Wait until so many messages have been read ahead."""
    assert board.wait_until(lambda: len(link._inbox) >= number, 5)


def test_no_message_is_taken_while_the_answer_to_another_is_unsent(pair: Pair) -> None:
    board, link, client = pair
    link.send_file(MessageType.SEND_MODEL, LARGE)
    client.send_message_as_json(MessageType.ROUND_TRAINED)
    came(board, link)
    assert board.first_arrived([link]) is None
    assert not link.has_sent()
    client.receive_file(MessageType.SEND_MODEL)
    assert board.wait([link]) is link
    assert link.has_sent()
    link.receive_message_as_json(MessageType.ROUND_TRAINED)


def test_notices_to_one_that_does_not_keep_up_are_left_out(pair: Pair) -> None:
    board, link, client = pair
    link.send_file(MessageType.SEND_MODEL, LARGE)
    for _ in range(1000):
        link.send_message_as_json(MessageType.MESSAGE, content="waiting for client_1")
        link.send_heartbeat(0.0)
    assert len(link._outbox) == 1
    client.receive_file(MessageType.SEND_MODEL)
    board.wait_until(link.has_sent, 5)
    link.send_message_as_json(MessageType.MESSAGE, content="heard again")
    heard: list[str] = []
    client.on_notice = heard.append
    link.send_message_as_json(MessageType.TRAINING_DONE)
    client.receive_message_as_json(MessageType.TRAINING_DONE)
    assert heard == ["heard again"]


def test_a_notice_does_not_resume_a_conversation(pair: Pair) -> None:
    """It would wait for its message in the thread that runs all conversations."""
    board, link, client = pair
    heard = SimpleQueue[str]()
    link.on_notice = heard.put
    client.send_message_as_json(MessageType.MESSAGE, content="waiting for client_1")
    client.send_message_as_json(MessageType.MESSAGE, content="waiting for nobody")
    assert [heard.get(timeout=5), heard.get(timeout=5)][1] == "waiting for nobody"
    assert board.first_arrived([link]) is None
    client.send_message_as_json(MessageType.ROUND_TRAINED)
    assert board.wait([link]) is link
    link.receive_message_as_json(MessageType.ROUND_TRAINED)


@lost_after_1_s
def test_one_that_takes_nothing_is_lost_with_what_it_asked_for(pair: Pair) -> None:
    board, link, client = pair
    link.send_file(MessageType.SEND_MODEL, LARGE)
    for _ in range(3):
        client.send_message_as_json(MessageType.ROUND_TRAINED)
    came(board, link, 3)
    link.heard_at += 60  # so that it is not lost by its silence first
    with pytest.raises(ConnectionLost, match=r"client_0 (took nothing for 1 s|is out of reach)"):
        board.wait([link]).receive_message_as_json(MessageType.ROUND_TRAINED)
    with pytest.raises(ConnectionLost):
        link.send_file(MessageType.SEND_MODEL, LARGE)
    assert not link._outbox


@lost_after_1_s
def test_one_that_takes_a_little_now_and_then_is_lost_as_well(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline that every byte puts off is none; here 1 GB/s is wanted, and 10 MB/s come."""
    monkeypatch.setattr(transport, "SLOWEST_BYTES_PER_S", 1e9)
    board, link, client = pair
    link.send_file(MessageType.SEND_MODEL, LARGE)
    ended, buffer = threading.Event(), memoryview(bytearray(100_000))

    def read_slowly() -> None:
        with contextlib.suppress(OSError):  # at the end
            while not ended.wait(0.01) and client._stream.receive_into(buffer):
                client.send_heartbeat(0.1)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    assert board.wait_until(lambda: link.end_reason(), 30)
    ended.set()
    reader.join()
    assert "client_0 takes what it is sent too slowly" in str(link.end_reason())


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_dropped_while_it_stays(launcher: Launcher) -> None:
    greed = GREEDY["steps, and nothing is read"]
    server, target = started(launcher, *greed.server, "--run", "r", "--peer-timeout", 1)
    with target.reach() as stream:
        insider = Insider(stream, claim=greed.claim)
        insider.begin()
        greed.first(insider)
        flood = threading.Thread(target=greed.do, args=[insider])
        flood.start()
        wait_for(server, "client_0 is away: client_0 ")
        flood.join()


@pytest.mark.slow
@on_linux
def test_weights_for_one_that_does_not_ask_wait_until_it_reads(launcher: Launcher) -> None:
    """In synchronous SGD who has no batch left is sent the weights of every step."""
    options = ["--clients", 2, *SERVER[2:], "--model", "mlp", "--scheme", "sync-sgd"]
    server, target = started(launcher, *options, "--batch-size", 4, "--run", "r")
    with target.reach() as stream, target.reach() as other:
        busy, idle = Insider(stream, 0, Claim(train=4 * 200)), Insider(other, 1, Claim(train=2))
        other_begins = threading.Thread(target=idle.begin)
        other_begins.start()
        busy.begin()
        other_begins.join()
        data = zero_gradients(busy)
        send_gradients(idle, data)
        gradients(busy)
        before = peak_bytes(process_of(server))
        for step in range(1, 200):
            send_gradients(busy, data, step)
            busy.link.receive_file(MessageType.SEND_AGGREGATED_MODEL)
        assert peak_bytes(process_of(server)) - before < 32 * MIB  # the weights: 87 MB


REFUSALS = {
    "10^9 samples": r"1,000,000,008 samples; --max-samples allows 10,000,000",
    "10^9 samples to evaluate": r"1,000,000,012 samples; --max-samples allows 10,000,000",
    "10^7 samples, a step each": r"9,999,990 steps a round; at most 1,048,576 are possible",
    "predictions of 4 GB": r"predictions would take 4,008 MB; at most 268 MB are kept",
    "a class of 2^31 samples": r"2,147,483,647 samples by their classes, but 8 training samples",
    "more samples than MNIST has": r"70,009 samples; mnist has 70,000",
}


@on_linux
@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_is_refused_before_it_costs_anything(launcher: Launcher, name: str) -> None:
    options, claim = CLAIMS[name]
    server, target = started(launcher, *options, "--run", "r")
    grown, answer = try_claim(target, claim, process_of(server))
    assert grown < 32 * MIB
    assert re.search(f"client_0 reports .*{REFUSALS[name]}", answer), answer


@on_linux
def test_max_samples_is_the_servers_to_say(launcher: Launcher) -> None:
    options = [*SERVER, "--model", "mlp", "--max-samples", 15]
    server, target = started(launcher, *options, "--run", "r")
    _, answer = try_claim(target, Claim(), process_of(server))
    assert "reports 16 samples; --max-samples allows 15" in answer


@on_linux
def test_a_shape_that_no_data_set_says_is_bounded(launcher: Launcher) -> None:
    own = ["--dataset", "tests.test_data:small", "--clients", 1, "--memory-limit", "100mb"]
    server, target = started(launcher, *own, "--model", "mlp", "--run", "r")
    _, answer = try_claim(target, Claim(shape=(1, 4096, 4096)), process_of(server))
    assert re.search(r"samples of \[1, 4096, 4096\]: mlp for them would take about", answer)
    assert "--memory-limit allows 100 MB" in answer


@on_linux
def test_samples_whose_tensors_the_disk_does_not_hold_are_refused(launcher: Launcher) -> None:
    options = [*SERVER[:-2], "--model", "cnn-femnist", "--rounds", 2**30, "--batch-size", 1000]
    server, target = started(launcher, *options, "--run", "r")
    _, answer = try_claim(target, Claim(train=9 * 10**6), process_of(server))
    assert re.search(r"9,000,000 training samples, whose tensors take about .* are free", answer)


def test_figures_of_steps_are_checked_all_at_once() -> None:
    sizes = torch.tensor([4, 4, 2])
    good = [[0.5, 4], [float("nan"), 0], [float("inf"), 2]]
    table = checked_steps(torch.tensor(good, dtype=torch.float64), sizes)
    assert table[:, 2].tolist() == [4, 4, 2]
    for wrong in ([-1, 2], [1e61, 2], [1, 3], [1, -1], [1, 0.5], [1, float("nan")]):
        with pytest.raises(ProtocolError) as ours:
            checked_steps(torch.tensor([*good[:2], wrong], dtype=torch.float64), sizes)
        with pytest.raises(ProtocolError, match=re.escape(str(ours.value))):
            checked(float(wrong[0]), [float(wrong[1])], 2)


def test_as_many_steps_as_may_be_are_a_file_of_16_mib() -> None:
    run = RunConfig(scheme="fl", model="mlp")
    split = SplitModel(Recipe.of(run), (1, 28, 28), 10)
    limits = server_limits(split, MOST_STEPS, Limits().store).payload_bytes
    assert limits[MessageType.TRAINING_FIGURES] < 17 * MIB


# A server that names what is too large


@on_linux
@pytest.mark.parametrize("name", WISHES)
def test_a_client_spends_no_more_than_it_allows(
    launcher: Launcher, tmp_path: Path, name: str
) -> None:
    write_ham10000(tmp_path / "data")
    with listen("127.0.0.1", 0) as listener:
        launcher.port = listener.port
        options = ["--memory-limit", "1gb", "--data-dir", tmp_path / "data"]
        client = launcher.client(*options, "--cache-dir", tmp_path / "cache")
        grown, answer = try_wish(listener, WISHES[name], process_of(client))
        assert grown < 400 * MIB  # torchvision's import, and no more
        assert "--memory-limit allows 1,000 MB" in answer
    line = client.ended_with(2)
    assert re.search(r"the server's --model \S+, --image-size \d+, --batch-size \d+ would", line)
    assert not (tmp_path / "cache").exists()


@on_linux
def test_own_images_are_counted_before_they_are_read(launcher: Launcher, tmp_path: Path) -> None:
    for k in range(60):
        path = tmp_path / "data" / str(k % 10) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"is not read")
    with listen("127.0.0.1", 0) as listener:
        launcher.port = listener.port
        client = launcher.client("--memory-limit", "900mb", "--data-dir", tmp_path / "data")
        wish = {"partition": "own", "model": "resnet18", "image_size": 4096, "batch_size": 1}
        _, answer = try_wish(listener, wish, process_of(client))
    assert re.search(r"images 1,007 MB\); --memory-limit allows 900 MB", answer)
    client.ended_with(2)


def test_a_run_that_fits_its_limit_runs(launcher: Launcher) -> None:
    options = ["--model", "mlp", "--batch-size", 400, "--rounds", 1, "--image-size", 32]
    launcher.run(*options, clients=1, client_options=["--memory-limit", "50mb"])


def test_images_are_resized_when_they_are_drawn() -> None:
    pixels = torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8)
    samples = Samples(pixels, torch.arange(60) % 10)
    run = RunConfig(image_size=64, augment="none", clients=1)
    spec = DATASETS["mnist"].sized(64)
    data = part_of(spec, run, 0, (samples, samples))
    assert data.train.stored is pixels
    whole = data.train.x
    assert whole.shape == (48, 1, 64, 64)
    for at in (slice(0, 1), slice(5, 12), torch.tensor([3, 40, 3])):
        assert torch.equal(data.train.take(at).x, whole[at])
        x, y = data.batch(data.train, at)
        assert torch.equal(x, (whole[at].float() / 255 - spec.mean) / spec.std)
        assert torch.equal(y, data.train.y[at])


@pytest.mark.parametrize(
    "model", ["mlp", "lenet5", "cnn-mnist", "cnn-femnist", "tests.support.models:bn_dropout"]
)
@pytest.mark.parametrize("scheme", ["sflv1", "fl"])
def test_sizes_are_those_of_the_model_that_is_built(model: str, scheme: str) -> None:
    run = RunConfig(model=model, scheme=scheme, cut=2)
    split = SplitModel(Recipe.of(run), (1, 28, 28), 10)
    sizes = sizes_of(split.recipe, (1, 28, 28), 10)
    front = sum(spec.num_bytes for spec in split.front_spec.values())
    back = sum(spec.num_bytes for spec in split.back_spec.values())
    assert (sizes.front, sizes.whole) == (front, front + back if scheme == "sflv1" else front)
    at_cut = split.features_spec(1).num_bytes if scheme == "sflv1" else 0
    assert sizes.at_cuts == ((at_cut,) if at_cut else ())
    assert sizes.all_values >= sizes.front_values >= at_cut


def test_sizes_of_several_cuts_are_those_of_all_segments() -> None:
    split = SplitModel(Recipe.of(RunConfig(model="lenet5", cut="3,9")), (1, 28, 28), 10)
    sizes = sizes_of(split.recipe, (1, 28, 28), 10)
    specs = {n: sum(spec.num_bytes for spec in own.values()) for n, own in split.specs.items()}
    assert sizes.front == specs["front"] + specs["client_head"]
    assert sizes.whole == sum(specs.values())
    assert sizes.at_cuts == tuple(split.features_spec(1, link).num_bytes for link in (0, 1))


@pytest.mark.parametrize(
    ("text", "count"), [("500mb", 5 * 10**8), ("1.5GB", 15 * 10**8), ("2 tb", 2 * 10**12)]
)
def test_sizes_are_written_with_their_unit(text: str, count: int) -> None:
    assert parse_bytes(text.replace(" ", "")) == count
    for wrong in ("", "5", "0mb", "-1gb", "mb", "1gib", "1e9mb", "nan gb"):
        with pytest.raises(ConfigError, match=r"--memory-limit .*give a size as 500mb or 4gb"):
            parse_bytes(wrong)
    assert machine_memory_bytes() > 10**8


def test_a_server_needs_memory_for_each_copy_of_the_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "groups", Scheme(source="-", back_of=lambda client: client % 2))
    needed = []
    for scheme in ("sflv2", "groups", "sflv1"):  # one copy, two, four
        recipe = Recipe.of(RunConfig(scheme=scheme, clients=4))
        sizes = sizes_of(recipe, (1, 28, 28), 10)
        needed.append(server_bytes(recipe, sizes, 4)["weights"])
    one, two, four = needed
    back = sizes.whole - sizes.front
    assert (two - one, four - one) == (back, 3 * back)
