"""Machines with an address each: network namespaces of Linux, on one bridge."""

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

from tests.support.launch import Program

CLONE_NEWNET = 0x40000000  # of <linux/sched.h>


@dataclass(frozen=True)
class Inside:
    """A program's main function, in a namespace."""

    namespace: str
    main: Callable[[list[str]], int]

    def __call__(self, argv: list[str]) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as file:
            if libc.setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"namespace {self.namespace}")
        return self.main(argv)


@dataclass(frozen=True)
class Machines:
    """Machines by name; each reaches all others."""

    names: Sequence[str]

    def address(self, name: str) -> str:
        return f"10.77.0.{11 + self.names.index(name)}"  # none is the beginning of another

    def inside(self, name: str, main: Callable[[list[str]], int]) -> Inside:
        return Inside(_namespace(name), main)

    def make(self) -> None:
        _ip("netns", "add", switch := _namespace("switch"))
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for index, name in enumerate(self.names):
            own, port = _namespace(name), f"port{index}"
            _ip("netns", "add", own)
            veth = ["type", "veth", "peer", "name", "eth0", "netns", own]
            _ip("-n", switch, "link", "add", port, *veth)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", own, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", own, "link", "set", device, "up")


@contextlib.contextmanager
def machines(*names: str) -> Iterator[Machines]:
    """Make machines, and remove them at the end.

    Raises:
        OSError: they cannot be made here.
    """
    made = Machines(names)
    try:
        made.make()
        yield made
    finally:
        for name in ("switch", *names):
            with contextlib.suppress(OSError):
                _ip("netns", "delete", _namespace(name))


def remote_addresses(program: Program) -> set[str]:
    """Return the other ends of the TCP connections on a program's machine, in any state."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # it has ended
            text = Path(f"/proc/{program.process.pid}/net/{table}").read_text()
            found |= {_address(line.split()[2]) for line in text.splitlines()[1:]}
    return {address for address in found if not re.fullmatch(r"0\.0\.0\.0|::|127\..*", address)}


def _address(field: str) -> str:
    """Return the address of ``0B004D0A:223D``: words of 4 bytes, each in the machine's order."""
    words = re.findall("[0-9A-F]{8}", field.partition(":")[0])
    data = b"".join(int(word, 16).to_bytes(4, "little") for word in words)
    mapped = data[-4:] if len(data) == 4 else IPv6Address(data).ipv4_mapped
    return ".".join(map(str, mapped)) if isinstance(mapped, bytes) else str(mapped or "::")


def _namespace(name: str) -> str:
    return f"sfl-{os.getpid()}-{name}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
