"""The service of a trained back: who has a place, what it says, and whom a failure ends."""

import contextlib
import dataclasses
import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sfl
from sfl.config import RunConfig
from sfl.conversation import inference
from sfl.conversation.inference import InferenceParty, Offer
from sfl.conversation.limits import inference_limits
from sfl.errors import ConfigError, LetGo
from sfl.model.portable import read_portable
from sfl.model.topology import Holder
from sfl.nodes import ClientNode, ServerNode
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.trained import service
from sfl.trained.models import apart, latency, served
from sfl.transport.refusal_log import MAX_CONSOLE_LINES
from sfl.wire.messages import MessageType
from tests.support.dial import dial
from tests.support.launch import free_port
from tests.support.requesters import CPU, Requester
from tests.support.simulations import simulated


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sfl.Run:
    """A run of two rounds, with its front after each."""
    out = tmp_path_factory.mktemp("run")
    run = sfl.open_run(simulated(out, model="lenet5"))
    for index in (0, 1):
        sfl.export(run, "torch", "front", round=index, out=out / f"front_{index}.pt")
    return run


def front_of(run: sfl.Run, index: int) -> str:
    return str(run.path.parent.parent / f"front_{index}.pt")


class Stopped(Exception):
    pass


@pytest.fixture
def port(run: sfl.Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Serve the run to two requesters at once, in a thread of this process."""
    stops, port = threading.Event(), free_port()
    drop_idle = service.Service._drop_idle

    def drop_idle_or_stop(self: service.Service) -> None:
        drop_idle(self)
        if stops.is_set():
            raise Stopped

    def serve() -> None:
        node = ServerNode(
            serve=str(run.path), port=port, device="cpu", memory_limit=f"{room(run.split, 2)}kb"
        )
        with contextlib.suppress(Stopped):
            service.serve_model(RunConfig(), node)

    monkeypatch.setattr(service, "POLL_S", 0.05)
    monkeypatch.setattr(service.Service, "_drop_idle", drop_idle_or_stop)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield port
    stops.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def requester(port: int, run: sfl.Run) -> Iterator[Callable[[], Requester]]:
    with contextlib.ExitStack() as stack:

        def connect() -> Requester:
            link = stack.enter_context(dial(f"127.0.0.1:{port}", timeout_s=10))
            return Requester(link, Path(front_of(run, 1)), begins=True)

        yield connect


def room(split: SplitModel, requesters: int) -> int:
    """Return the memory that so many requesters take, in kB: five files of theirs, one of ours."""
    theirs, ours = (
        max(inference_limits(split, holder).payload_bytes.values())
        for holder in (Holder.SERVER, Holder.CLIENT)
    )
    return 1 + requesters * (5 * theirs + ours) // 1000


def test_a_large_answer_takes_its_room() -> None:
    split = SplitModel(Recipe.of(RunConfig(model="lenet5", cut="3,4")), (1, 28, 28), 10)
    for count in (1, 3):
        limit = 1000 * room(split, count)
        assert service.most_requesters(split, limit) == count
        with contextlib.suppress(ConfigError):  # which is no place at all
            assert service.most_requesters(split, limit - 2000) == count - 1


def test_what_fails_for_one_ends_it_alone(
    requester: Callable[[], Requester], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, outputs_pass = requester(), inference.outputs_pass
    faults: list[BaseException] = []

    def failing(party: object, cuts: object, x: object) -> object:
        if x is None and faults:
            raise faults.pop()
        return (yield from outputs_pass(party, cuts, x))

    monkeypatch.setattr(inference, "outputs_pass", failing)
    for fault, said in (
        (MemoryError("can't allocate memory"), "MemoryError: can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory\nand more"), "CUDA out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ):
        faults.append(fault)
        bad = requester()
        with pytest.raises(LetGo, match=f"cannot be served now: .*{said}"):
            bad.infer()
        bad.link.close()
        assert len(good.infer()) == 4


def test_places_are_not_held_without_asking(
    requester: Callable[[], Requester], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IDLE_S", 60.0)
    idle, busy = requester(), requester()
    with pytest.raises(LetGo, match="2 requesters are served: try again later"):
        requester()
    monkeypatch.setattr(service, "IDLE_S", 1.0)
    time.sleep(1.0)
    assert len(busy.infer()) == 4
    new = requester()
    with pytest.raises(LetGo, match="no batch for 1 seconds, and others ask: connect again"):
        idle.infer()
    assert len(new.infer()) == 4
    assert len(busy.infer()) == 4


@dataclasses.dataclass(eq=False)
class Stranger:
    """A member of ``Members``."""

    address: str
    peer_name: str = ""

    def age_s(self) -> float:
        return 0.0


class Members:
    """A network of two: one comes first; then both have sent something, the other before it."""

    def __init__(self) -> None:
        self.members = [Stranger("first"), Stranger("second")]
        self.turns = [self.members[:1], self.members[::-1]]

    def wait_until(self, ready: object, timeout_s: float) -> None:
        if not self.turns:
            raise Stopped

    def ready_members(self) -> list[Stranger]:
        return self.turns.pop(0)

    def drop(self, member: Stranger, *why: object) -> None:
        self.members.remove(member)

    def log_refusal(self, address: str, reason: str) -> None:
        assert address == "first"
        assert "others ask" in reason


def test_who_has_made_room_is_not_served_again(
    run: sfl.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def talk(
        party: InferenceParty, offer: Offer, admit: Callable[[], None], count: object
    ) -> object:
        begun.append(party.link.address)
        yield
        admit()
        yield

    monkeypatch.setattr(service, "server_serve", talk)
    monkeypatch.setattr(service, "IDLE_S", 0.0)
    holding = service._Holding(run.split, run.split.segments(Holder.SERVER, CPU))
    with pytest.raises(Stopped):
        service.Service(Members(), holding, Offer("r", 1, 0, "", 1.0), 1).run()
    assert begun == ["first", "second"]


def test_visits_without_a_batch_have_few_lines(
    requester: Callable[[], Requester], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(MAX_CONSOLE_LINES + 5):
        requester().link.close()
    assert len(requester().infer()) == 4
    lines = capsys.readouterr().out.splitlines()
    visits = [line for line in lines if line.startswith("turned away 127.0.0.1:")]
    assert len(visits) == MAX_CONSOLE_LINES
    assert all("0 samples for requester_" in line for line in visits)
    assert not [line for line in lines if "requester_" in line and line not in visits]


def test_a_terminal_that_is_gone_ends_nothing(
    requester: Callable[[], Requester], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError

    first, second = requester(), requester()
    first.infer()
    monkeypatch.setattr(service, "say", broken)
    first.link.send_message_as_json(MessageType.UNREGISTER)
    time.sleep(0.2)
    assert len(second.infer()) == 4


def test_a_front_and_a_back_of_different_rounds_are_told(
    port: int, run: sfl.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, said in (
        (1, ""),
        (0, "not trained together: rounds 1 and 2, other weights of the server's part\n"),
    ):
        node = ClientNode(server=f"127.0.0.1:{port}", device="cpu")
        with served([front_of(run, index)], node, CPU) as model:
            assert len(model.outputs(torch.zeros(2, 1, 28, 28))) == 2
        out = capsys.readouterr().out
        assert said in out
        assert ("warning" in out) == bool(said)


def test_each_difference_is_named(run: sfl.Run) -> None:
    about = read_portable(front_of(run, 1)).about
    ours = Offer("r", 1, 0, about.back_checksum, 1.0)
    assert apart(about, ours) == ""
    for changes, said in (
        ({"run": "s"}, "runs r and s"),
        ({"seed": 5}, "seeds 0 and 5"),
        ({"back_checksum": "0"}, "other weights of the server's part"),
    ):
        assert apart(about, dataclasses.replace(ours, **changes)) == said
    unknown = dataclasses.replace(about, back_checksum="")
    assert apart(unknown, ours) == ""


def test_what_95_percent_stay_within() -> None:
    for slow, said in ((1, "1.0"), (2, "7.0")):
        seconds = [0.007] * slow + [0.001] * (20 - slow)
        assert latency(seconds) == f"20 batches: median latency 1.0 ms, 95 % within {said} ms"
    assert latency([0.002, 0.004]) == "2 batches: median latency 3.0 ms, 95 % within 4.0 ms"


def test_one_that_closes_between_batches_has_just_left(
    requester: Callable[[], Requester], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a closed tab does: no word of farewell, and no failure."""
    leaving, seen = requester(), ""
    leaving.infer()
    leaving.link.close()
    end = time.monotonic() + 20
    while "samples for requester_" not in seen:
        assert time.monotonic() < end
        seen += capsys.readouterr().out
        time.sleep(0.01)
    assert re.search(r"^4 samples for requester_1 at 127\.0\.0\.1:\d+ \(4 in all\)$", seen, re.M)
    assert "turned away" not in seen
