"""The device, its determinism, and the record of what can change the last bit of a result."""

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sfl import __version__
from sfl.errors import ConfigError, RunError, counted, is_clone
from sfl.nodes import NodeConfig

FINGERPRINT = ("sfl", "torch", "capability", "threads", "device")
_MOST_CHARACTERS = 120  # of a field; GPU, driver, CUDA and cuDNN together take about 80
# Workspaces with which cuBLAS sums in a fixed order: NVIDIA's manual of cuBLAS, "Results
# Reproducibility". It reads the variable when a process first uses it.
_CUBLAS, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


class Devices(tuple[torch.device, ...]):
    """The devices that a process computes on; the first has what there is one of."""

    def of(self, number: int) -> torch.device:
        """Return the device of a model by its number, which are dealt to the devices in turn."""
        return self[number % len(self)]


def set_up_torch(node: NodeConfig) -> torch.device:
    """Set up a process that computes on one device, and return it, as ``set_up_devices``."""
    return set_up_devices(node, 1, "this program").of(0)


def set_up_devices(node: NodeConfig, most: int, holder: str) -> Devices:
    """Set threads and determinism of this process; return the devices to compute on.

    ``most``: the models that the ``holder`` has to spread over devices.

    Raises:
        ConfigError: there are more devices than models.
        RunError: there is no such device, or they give different last bits.
    """
    if len(node.devices) > most:
        raise ConfigError(
            f"--device {node.device}: {holder} holds {counted(most, 'model')}; give at most"
            f" {counted(most, 'device')}"
        )
    os.environ.setdefault(_CUBLAS, _WORKSPACES[0])  # before anything asks for a GPU
    torch.set_num_threads(node.threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    devices = named_devices(node)
    if devices[0].type == "cuda":
        # Operations without a deterministic form are named at the start, by
        # strategy/start_check.py; later they give a warning.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else each new tensor is filled first, also in page-locked memory: for finding mistakes.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        _check_gpus(devices)
    return devices


def named_devices(node: NodeConfig) -> Devices:
    """Return the devices that ``--device`` names; "auto" is a GPU if there is one."""
    auto = "cuda" if "auto" in node.devices and torch.cuda.is_available() else "cpu"
    return Devices(torch.device(auto if n == "auto" else n) for n in node.devices)


@contextlib.contextmanager
def deterministic_alone() -> Iterator[None]:
    """Let an operation without a deterministic form raise RuntimeError, in the ``with`` block."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _check_gpus(devices: Devices) -> None:
    """Check that these GPUs are there, of one model, and sum in a fixed order.

    Raises:
        RunError: they are or do not.
    """
    if (workspace := os.environ[_CUBLAS]) not in _WORKSPACES:
        raise RunError(
            f"{_CUBLAS}={workspace}: with it a GPU gives other last bits each time; unset it, or"
            f" set {' or '.join(_WORKSPACES)}"
        )
    there = torch.cuda.device_count()
    for device in devices:
        if (device.index or 0) >= there:
            raise RunError(f"--device {device}: this machine has {there} such devices")
    if len(models := {torch.cuda.get_device_name(device): device for device in devices}) > 1:
        named = ", ".join(f"{device} is {model}" for model, device in models.items())
        raise RunError(
            f"--device: {named}; their last bits differ, so that the run could not be replayed:"
            " give GPUs of one model"
        )


def fingerprint(device: torch.device) -> dict[str, str]:
    """Return what can change the last bit of a result.

    AVX2 and AVX512, and different numbers of threads, sum in different orders.
    """
    return {
        "sfl": __version__,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": _gpu(device)[:_MOST_CHARACTERS] if device.type == "cuda" else "cpu",
    }


def _gpu(device: torch.device) -> str:
    """Return a GPU's name, its driver, and the libraries that compute there."""
    name, cuda = torch.cuda.get_device_name(device), torch.version.cuda
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    libraries = f"CUDA {cuda}, cuDNN {cudnn}"
    return f"cuda: {name}, driver {driver_version()}, {libraries}"


@functools.cache
def driver_version(module: Path = Path("/sys/module/nvidia/version")) -> str:
    """Return the version of NVIDIA's driver; "unknown" if neither kernel nor nvidia-smi says."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = module.read_text()
    except OSError:
        try:
            text = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            text = ""
    found = re.match(r"\d+(\.\d+)+", text)
    return found[0] if found else "unknown"


def check_fingerprint(fields: object) -> dict[str, str]:
    """Return a fingerprint from another machine or a file, after a check.

    Raises:
        ConfigError: fields are missing or not text.
    """
    if not isinstance(fields, dict) or not all(type(fields.get(n)) is str for n in FINGERPRINT):
        raise ConfigError(f"a fingerprint has the fields {', '.join(FINGERPRINT)}")
    return {name: fields[name][:_MOST_CHARACTERS] for name in FINGERPRINT}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return a text for each difference between two fingerprints."""
    pairs = {name: (theirs.get(name), ours.get(name)) for name in FINGERPRINT}
    return [f"{name} {one} against {other}" for name, (one, other) in pairs.items() if one != other]


def other_runtime(fields: Mapping[str, str]) -> str:
    """Return what a machine computes with, by its fingerprint, if that is not torch; else ""."""
    return fields["torch"] if fields["torch"].endswith("in a browser") else ""


def describe(device: torch.device, command_line: Sequence[str]) -> dict[str, Any]:
    """Return the record of this process: versions, git commit, command line, fingerprint."""
    packages = ("torch", "torchvision", "numpy", "mlxtend")
    return {
        "sfl": __version__,
        "git_commit": _git_commit(),
        "command_line": list(command_line),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "fingerprint": fingerprint(device),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    """Return the commit of this checkout, with "-dirty" if files have changed since.

    An installed package has none; the folder that it is installed in may lie in another checkout.
    """
    if not is_clone():
        return "unknown"
    what = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "--no-optional-locks", *what]
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def command_line() -> list[str]:
    """Return the command that started this process."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
