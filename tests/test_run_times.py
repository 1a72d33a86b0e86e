"""The program that times schemes, and the slow link that it puts between server and clients."""

import socket
import threading
import time
from pathlib import Path

import pytest

from experiments.measure.run_times import numbers
from experiments.support.slow_link import slow_link
from sfl.errors import ConfigError
from tests.support.programs import run_program


def echo(listener: socket.socket) -> None:
    peer, _ = listener.accept()
    with peer:
        while data := peer.recv(65536):
            peer.sendall(data)


@pytest.mark.parametrize(
    ("delay_s", "bytes_per_s", "at_least_s"), [(0.05, 1e12, 0.1), (0.0, 2e6, 0.1)]
)
def test_a_slow_link_delays_and_carries_every_byte(
    delay_s: float, bytes_per_s: float, at_least_s: float
) -> None:
    sent = bytes(range(256)) * 800
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=echo, args=(listener,))
        thread.start()
        port = listener.getsockname()[1]
        with slow_link("127.0.0.1", port, delay_s=delay_s, bytes_per_s=bytes_per_s) as address:
            host, _, near_port = address.rpartition(":")
            with socket.create_connection((host, int(near_port))) as near:
                started = time.monotonic()
                writer = threading.Thread(target=near.sendall, args=(sent,))
                writer.start()
                received = bytearray()
                while len(received) < len(sent):
                    received += near.recv(65536)
                assert time.monotonic() - started >= at_least_s
                writer.join()
                near.shutdown(socket.SHUT_WR)
                assert near.recv(1) == b""  # the end travels, too
            thread.join()
    assert received == sent


@pytest.mark.slow
def test_run_times_prints_a_row_for_each_run(tmp_path: Path) -> None:
    options = ["--schemes", "sl,sflv2", "--delays-ms", "0,5", "--rounds", 1, "--clients", 2]
    options += ["--model", "mlp", "--batch-size", 400]
    lines = run_program("-m", "experiments.measure.run_times", *options).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in cells[2:]] == [
        ["0 ms", "sl"], ["0 ms", "sflv2"], ["5 ms", "sl"], ["5 ms", "sflv2"],
    ]  # fmt: skip
    assert cells[2][4] == cells[4][4]  # a delay changes no weights
    assert cells[3][4] == cells[5][4]
    assert cells[2][3] == "1.00"


def test_delays_that_make_no_sense_are_refused() -> None:
    assert numbers("0,2.5") == [0, 2.5]
    for text in ("-1", "a", ""):
        with pytest.raises(ConfigError, match="give milliseconds"):
            numbers(text)


@pytest.mark.slow
def test_a_place_for_weights_is_checked_before_a_run(tmp_path: Path) -> None:
    place = f"dir:{tmp_path / 'shared'}"
    out = run_program(
        "-m", "experiments.weights_store", "--weights", place, "--megabytes", 0.1
    ).stdout
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "reached", "written", "read back", "written again, with the same content",
        "it cannot be overwritten", "deleted", "dir",
    ]  # fmt: skip
    assert list((tmp_path / "shared/check").iterdir()) == []
    (tmp_path / "file").write_text("")
    place = f"dir:{tmp_path / 'file'}"
    done = run_program("-m", "experiments.weights_store", "--weights", place, code=1)
    assert done.stderr.startswith("weights_store: error: cannot use dir:")
    done = run_program("-m", "experiments.weights_store", "--weights", "gs://X", code=2)
    assert "is no name of a bucket" in done.stderr


@pytest.mark.slow
def test_ways_for_weights_are_timed(tmp_path: Path) -> None:
    ways = f"socket,dir:{tmp_path / 'shared'}"
    options = ["--weights", ways, "--megabytes", 0.5, "--rounds", 2]
    lines = run_program("-m", "experiments.measure.weights_times", *options).stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ways.split(",")
    assert all(len(line.split("|")[2].split(",")) == 2 for line in lines[2:])
