"""Throw mutated frames, files, JSON and handshakes at whatever reads them.

python -m experiments.fuzz [--frames N] [--flips N] [--files N] [--texts N] [--handshakes N]
    [--seed K]

Each case is drawn from (seed, kind, number) alone, so that one that fails can be had again. What
may come out is a message or a tensor as expected, or one of the project's own errors; nothing may
hang, write a file, or take much memory. A frame with one flipped bit is damaged, and nothing else.
Exit code 0 if all is so, else 1.
"""

import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from sfl.cli import run_program
from sfl.errors import shortened

HANG_S = 5.0  # of a case that takes a millisecond
MAX_FRAME_BYTES = 64 * 2**10  # of a payload that the decoder accepts
# How many of each kind, if not said otherwise.
KINDS = {
    "frames": 1_000_000, "flips": 100_000, "files": 100_000, "texts": 20_000, "handshakes": 100_000,
}  # fmt: skip


class Hangs(BaseException):
    """A case took too long."""


@dataclass
class Report:
    """What came of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    grown_bytes: int = 0  # the most that one process took beyond what it had after a warm-up

    def add(self, other: "Report") -> None:
        self.outcomes += other.outcomes
        self.failures += other.failures
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.grown_bytes = max(self.grown_bytes, other.grown_bytes)


def mutate(data: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    """Return the bytes with one to four changes: flipped, replaced, cut, doubled, spliced."""
    changed = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(changed) + 1)
        length = min(draws.choice((1, 2, 4, 8, 64, 1024)), len(changed) - at)
        match draws.randrange(8):
            case 0 if length:
                changed[at] ^= 1 << draws.randrange(8)
            case 1 if length:
                changed[at] = draws.randrange(256)
            case 2:
                changed[at : at + length] = draws.randbytes(length)
            case 3:
                extreme = draws.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                order = draws.choice(("big", "little"))
                size = draws.choice((4, 8))
                number = (extreme % 2 ** (8 * size)).to_bytes(size, order)
                changed[at : at + size] = number
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                del changed[at:]
            case 7:
                other = draws.choice(others)
                start = draws.randrange(len(other))
                changed[at : at + length] = other[start : start + draws.choice((8, 64, 1024))]
    return bytes(changed)


def flip(data: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    """Return the bytes with one bit flipped, wherever it is."""
    changed = bytearray(data)
    changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def frames() -> list[bytes]:
    """Return a valid frame of every type of message."""
    from sfl.values import Position
    from sfl.wire.framing import encode_head
    from sfl.wire.messages import FILE_TYPES, Message, MessageType

    found, flat = [], {"loss": 1.5, "correct": 3}
    contents = ("", flat, flat | {"names": ["a", "b"], "nested": [[{"x": None}]]})
    for kind, content in itertools.product(MessageType, contents):
        payload = bytes(range(200)) if kind in FILE_TYPES else b""
        message = Message(kind, "client_0", "server", content, Position("run", 1, 2, 0), payload)
        found.append(encode_head(message) + payload)
    return found


def decode_frames(data: bytes) -> str:
    """Feed bytes to a decoder, in pieces; return what came of it."""
    from sfl.wire.framing import Decoder
    from sfl.wire.messages import FILE_TYPES, Limits

    decoder = Decoder(Limits(payload_bytes=dict.fromkeys(FILE_TYPES, MAX_FRAME_BYTES)))
    rest, whole = memoryview(data), 0
    while rest:
        with decoder.get_buffer() as buffer:
            taken = min(len(buffer), len(rest), 97)
            buffer[:taken] = rest[:taken]
        decoder.advance(taken)
        rest = rest[taken:]
        while decoder.next_message() is not None:
            whole += 1
    return f"{whole} whole messages"


def decode_flipped(data: bytes) -> str:
    """Feed a frame with a flipped bit to a decoder."""
    from sfl.errors import Damaged

    try:
        outcome = decode_frames(data)
    except Damaged:
        return "Damaged"
    raise AssertionError(f"a flipped bit gives {outcome}")


def files() -> list[bytes]:
    """Return valid files of tensors and of dicts of tensors, and some of bad will."""
    import torch

    from experiments.hostile.files import hostile_files
    from sfl.files.torch_file import encode, encode_state

    tensors = [
        torch.zeros(3, 4),
        torch.arange(7),
        torch.ones(1),
        torch.zeros(0),
        torch.eye(9).half(),
    ]
    state = torch.nn.BatchNorm1d(3).state_dict()
    bad = [data for data, _ in hostile_files().values() if 0 < len(data) < 4096]
    # Valid ones more often: what is close to right goes deeper.
    return [*(encode(t) for t in tensors), encode_state(state)] * 8 + bad


def load_file(data: bytes) -> str:
    """Load bytes as a tensor and as a state; return what came of it."""
    import torch

    from sfl.errors import IntegrityError
    from sfl.files.torch_file import TensorSpec, decode, decode_state, state_spec

    for tensor in (torch.zeros(3, 4), torch.arange(7), torch.eye(9).half()):
        try:
            decode(data, TensorSpec.of(tensor), "file")
            return "a tensor as expected"
        except IntegrityError as error:
            last = error
    try:
        decode_state(data, state_spec(torch.nn.BatchNorm1d(3).state_dict()), "file")
        return "a state as expected"
    except IntegrityError:
        raise last from None


def texts() -> list[bytes]:
    """Return JSON of what a reader stumbles over: quotes, backslashes, brackets, long ones too."""
    words = [b'"', b"\\", b'\\"', b"[", b"]", b"{", b"}", b",", b":", b'"a":', b"1e999", b"9" * 30,
             b"\\ud800", b"\xff", b"NaN", b"\n", b"\0"]  # fmt: skip
    short = [b"".join(random.Random(n).choices(words, k=60)) for n in range(200)]
    return [*short, *(word * (60_000 // len(word)) for word in words), b"[" * 20 + b'\\"' * 30_000]


def read_text(data: bytes) -> str:
    """Read bytes as JSON; return what came of it."""
    from sfl.errors import ProtocolError
    from sfl.files import strict_json

    try:
        value = strict_json.loads(data)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    return f"a {type(value).__name__}"


TOKEN = "t" * 43


def handshakes() -> list[bytes]:
    """Return what a client says before it is let in: AUTHENTICATE, a proof, REGISTER."""
    from sfl.wire.framing import encode_head
    from sfl.wire.messages import Message, MessageType

    hello = {"role": "client", "client_id": 0, "nonce": "0" * 64}
    said = {MessageType.AUTHENTICATE: hello, MessageType.PROOF: {"proof": "0" * 64}}
    frames = [encode_head(Message(kind, content=content)) for kind, content in said.items()]
    return [b"".join(frames), *frames, encode_head(Message(MessageType.REGISTER, content=hello))]


def shake_hands(data: bytes) -> str:
    """Say bytes at the door of a server that has a token; return what came of it."""
    import socket
    from pathlib import Path

    from sfl.errors import AuthError, ConnectionLost, ProtocolError
    from sfl.transport.guard import Guard
    from sfl.transport.pending import PendingConnection
    from sfl.transport.tokens import Tokens

    ours, theirs = socket.socketpair()
    with ours, theirs:
        visitor = PendingConnection(ours, Guard(tokens=Tokens(Path("token"), TOKEN)))
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            let_in = visitor.go_on()
        except (AuthError, ConnectionLost) as error:
            raise ProtocolError(str(error)) from error
    if let_in:
        raise AssertionError("let in without a proof")
    return "waits"


CASES: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes], str]]] = {
    "frames": (frames, decode_frames),
    "flips": (frames, decode_flipped),
    "files": (files, load_file),
    "texts": (texts, read_text),
    "handshakes": (handshakes, shake_hands),
}


def run(kind: str, seed: int, first: int, count: int) -> Report:
    """Run the cases ``first`` to ``first + count`` of a kind."""
    from sfl.errors import Damaged, IntegrityError, ProtocolError

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"took longer than {HANG_S:g} s")

    signal.signal(signal.SIGALRM, hang)
    make, check = CASES[kind]
    change = flip if kind == "flips" else mutate
    corpus, report, before = make(), Report(), 0
    for number in range(first, first + count):
        draws = random.Random(f"{seed} {kind} {number}")
        data = change(draws.choice(corpus), draws, corpus)
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            outcome = check(data)
        except (ProtocolError, Damaged, IntegrityError) as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = "FAILURE"
            report.failures.append(f"{kind} {number}: {type(error).__name__}: {error}")
            if isinstance(error, KeyboardInterrupt | MemoryError):
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        report.outcomes[outcome] += 1
        report.slowest_s = max(report.slowest_s, time.perf_counter() - started)
        if number == first + min(count // 10, 2000):
            before = peak_bytes()
    report.grown_bytes = peak_bytes() - (before or peak_bytes())
    return report


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(counts: dict[str, int], seed: int, workers: int) -> dict[str, Report]:
    """Run so many cases of each kind, in processes of their own."""
    reports = {kind: Report() for kind in KINDS}
    jobs = []
    for kind, count in counts.items():
        share = -(-count // workers) if count else 0
        jobs += [(kind, seed, n, min(share, count - n)) for n in range(0, count, max(share, 1))]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        sys.path.insert(0, here)
        os.environ["PYTHONPATH"] = here
        os.chdir(folder)
        try:
            with context.Pool(workers) as pool:
                for job, report in zip(jobs, pool.starmap(run, jobs), strict=True):
                    reports[job[0]].add(report)
            if left := os.listdir(folder):
                reports["files"].failures.append(f"files were written: {left}")
        finally:
            os.chdir(here)
    return reports


def main() -> int:
    options = parse()
    started = time.perf_counter()
    counts = {kind: getattr(options, kind) for kind in KINDS}
    reports = fuzz(counts, options.seed, options.workers)
    for kind, report in reports.items():
        total = sum(report.outcomes.values())
        print(f"{total} mutated {kind}, seed {options.seed}:")
        for outcome, count in report.outcomes.most_common():
            print(f"  {count:9d}  {outcome}")
        print(
            f"  slowest {report.slowest_s * 1000:.0f} ms, memory beyond the warm-up"
            f" {report.grown_bytes / 2**20:.1f} MiB, {len(report.failures)} failures"
        )
        for failure in report.failures[:20]:
            print(f"  {shortened(failure, 200)}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if any(report.failures for report in reports.values()) else 0


def parse() -> Namespace:
    from sfl.options import Parser

    parser = Parser(prog="python -m experiments.fuzz", description=__doc__.partition("\n")[0])
    for kind, count in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"(default: {count:,})")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("fuzz", main))
