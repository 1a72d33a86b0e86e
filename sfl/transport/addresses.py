"""Addresses of machines: HOST:PORT."""

import ipaddress
import re
import socket
from dataclasses import dataclass

from sfl.errors import ConfigError, quoted
from sfl.nodes import DEFAULT_PORT

# Transport -> what may follow host and port.
_WEB = r"(/[^#]*)?"
_PATHS = {"tcp": "/?", "ws": _WEB, "wss": _WEB, "mpi": "", "rpc": r"/[1-9]\d{0,3}/[1-9]\d{0,3}"}


@dataclass(frozen=True)
class Address:
    """Where a server is, and over which transport it is reached."""

    transport: str  # tcp, ws, wss, mpi, rpc
    host: str
    port: int
    path: str = ""

    @property
    def url(self) -> str:
        return f"{self.transport}://{format_address(self.host, self.port)}{self.path or '/'}"


def parse_url(text: str) -> Address:
    """Return the address in plain HOST:PORT, ``ws://HOST:PORT/PATH``, or another transport's.

    Raises:
        ConfigError: the text is no such address.
    """
    found = re.fullmatch(r"(?:(\w+)://)?([^/\s@]*)(/[!-~]*)?", text, re.ASCII)
    transport, where, path = found.groups() if found else ("", "", "")
    transport, path = (transport or "tcp").lower(), path or ""
    if not found or not re.fullmatch(_PATHS.get(transport, "(?!)"), path):
        raise ConfigError(
            f"{quoted(text)} is no address: give HOST:PORT, ws://HOST:PORT/ for a WebSocket,"
            " wss://HOST:PORT/ for one under TLS, or rpc://HOST:PORT/RANK/SIZE"
        )
    if transport == "mpi" and not where:
        return Address("mpi", "rank", 0)
    return Address(transport, *parse_address(where), path)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; the port has a default.

    Raises:
        ConfigError: the text is not such an address.
    """
    found = re.fullmatch(r"(?:\[([^][]+)\]|([^][:\s]+))(?::(\d{1,5}))?", text, re.ASCII)
    port = int(found[3] or DEFAULT_PORT) if found else 0
    if not (found and 0 < port < 65536):
        raise ConfigError(
            f"{quoted(text)} is no address: give HOST:PORT, or HOST for port {DEFAULT_PORT}, with"
            " an IPv6 host in brackets: [HOST]:PORT"
        )
    return found[1] or found[2], port


def format_address(host: str, port: int) -> str:
    """Return ``host:port``, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_of(sock: socket.socket) -> str:
    """Return the peer's address, for logs."""
    try:
        return format_address(*sock.getpeername()[:2])
    except (OSError, TypeError, ValueError):
        return "an unknown address"


def is_loopback(host: str) -> bool:
    """Return whether a host to listen on is reachable from this machine only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return bool(host)
    addresses = (str(address[4][0]).partition("%")[0] for address in found)
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
