"""--device cuda:0,cuda:1: the models of a process are spread over its devices, in turn."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from sfl import environment
from sfl.config import RunConfig
from sfl.environment import (
    Devices,
    check_fingerprint,
    differences,
    driver_version,
    fingerprint,
    set_up_torch,
)
from sfl.errors import ConfigError, RunError
from sfl.model.topology import Holder
from sfl.nodes import ClientNode, NodeConfig, ServerNode
from sfl.runtime import simulation
from sfl.runtime.client_process import ClientProcess, devices_of
from sfl.runtime.server import serve
from sfl.strategy.split_model import SplitModel
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal

TWO = Devices([torch.device("cpu:0"), torch.device("cpu:1")])  # torch tells them apart by name


def made_on(
    out: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[Path, dict[Holder, list[torch.device]]]:
    """Simulate on two devices; return the run's folder, and where each party's models were."""
    made: dict[Holder, list[torch.device]] = {holder: [] for holder in Holder}
    segments = SplitModel.segments

    def noted(split: SplitModel, holder: Holder, device: torch.device) -> object:
        made[holder].append(device)
        return segments(split, holder, device)

    with monkeypatch.context() as patched:
        patched.setattr(simulation, "set_up_devices", lambda *_: TWO)
        patched.setattr(SplitModel, "segments", noted)
        return simulated(out, rounds=1, model="mlp", **options), made


@pytest.mark.parametrize(
    ("scheme", "backs"), [("sflv1", [TWO[0], TWO[1], TWO[0]]), ("sl", [TWO[0]])]
)
def test_models_are_dealt_to_the_devices_in_turn(
    scheme: str, backs: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = made_on(tmp_path / "two", monkeypatch, scheme=scheme, clients=3)
    assert made[Holder.SERVER] == backs
    assert made[Holder.CLIENT] == [TWO[0], TWO[1], TWO[0]]
    expected = simulated(tmp_path / "one", rounds=1, model="mlp", scheme=scheme, clients=3)
    assert_equal(all_weights(run), all_weights(expected))


def test_hosted_clients_are_dealt_by_their_place() -> None:
    """So that both devices are used, whichever clients a process hosts."""
    node = ClientNode(client_ids="4,2,8", device="cpu,cpu")
    process = ClientProcess(None, TWO, node.hosted)  # type: ignore[arg-type]
    assert [process.device_of(k) for k in node.hosted] == [TWO[0], TWO[1], TWO[0]]
    assert ClientProcess(None, TWO).device_of(5) == TWO[0]  # type: ignore[arg-type]
    assert devices_of(node) == (torch.device("cpu"),) * 2


@pytest.mark.parametrize("text", ["cpu,", "cpu,cuda:0", "auto,cpu", "cuda,cuda", "cuda:0,cpu", ""])
def test_what_is_no_list_of_devices_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="or a list of one kind, as cuda:0,cuda:1"):
        NodeConfig(device=text).check()


def test_more_devices_than_models_are_refused(tmp_path: Path) -> None:
    """In a line that says how many models there are: no device stays idle in silence."""
    two = NodeConfig(out=str(tmp_path), device="cpu,cpu,cpu")
    with pytest.raises(ConfigError, match="a simulation of 2 clients holds 2 models"):
        simulation.simulate(RunConfig(clients=2), two)
    with pytest.raises(ConfigError, match="a client without --client-ids holds 1 model"):
        devices_of(ClientNode(device="cpu,cpu"))
    with pytest.raises(ConfigError, match="--client-ids 3 holds 1 model"):
        devices_of(ClientNode(device="cpu,cpu", client_ids="3"))
    with pytest.raises(ConfigError, match="--device cpu,cpu: this program holds 1 model"):
        set_up_torch(NodeConfig(device="cpu,cpu"))
    server = ServerNode(out=str(tmp_path), device="cpu,cpu", port=0)
    with pytest.raises(ConfigError, match="of --scheme sl holds 1 model; give at most 1 device"):
        serve(RunConfig(scheme="sl"), server)


def test_gpus_must_be_there_and_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["A", "A", "B"]
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def of(text: str) -> Devices:
        return devices_of(ClientNode(device=text, client_ids="0-3"))

    assert [str(device) for device in of("cuda:1,cuda:0,cuda:1")] == ["cuda:1", "cuda:0", "cuda:1"]
    with pytest.raises(RunError, match="cuda:0 is A, cuda:2 is B; their last bits differ"):
        of("cuda:0,cuda:2")
    with pytest.raises(RunError, match="--device cuda:3: this machine has 3 such devices"):
        of("cuda:0,cuda:3")


def test_a_gpu_is_known_by_name_driver_and_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text("570.86.15\n")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(
        environment, "driver_version", partial(driver_version, tmp_path / "version")
    )
    found = fingerprint(torch.device("cuda"))
    assert found["device"] == "cuda: NVIDIA H200, driver 570.86.15, CUDA 12.8, cuDNN 91002"
    sent = {name: str(value) for name, value in found.items()}
    assert check_fingerprint(sent) == found  # nothing is cut off on its way
    (tmp_path / "other").write_text("570.99.1\n")
    monkeypatch.setattr(environment, "driver_version", partial(driver_version, tmp_path / "other"))
    (line,) = differences(found, fingerprint(torch.device("cuda")))
    assert "570.99.1" in line
    assert fingerprint(torch.device("cpu"))["device"] == "cpu"


def test_without_a_driver_its_version_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no nvidia-smi
    assert driver_version(tmp_path / "none") == "unknown"


def test_cublas_has_a_fixed_order_before_a_gpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def device_count() -> int:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return 1

    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(device_count()))
    monkeypatch.setattr(torch.cuda, "device_count", device_count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert set_up_torch(NodeConfig()).type == "cuda"
    assert set(seen) == {":4096:8"}
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(RunError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0: .* set :4096:8 or :16:8"):
        set_up_torch(NodeConfig(device="cuda"))
