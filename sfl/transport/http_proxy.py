"""A WebSocket's way through an HTTP proxy: the one that ``https_proxy`` or ``http_proxy`` names."""

import contextlib
import ipaddress
import socket

from websockets.exceptions import InvalidProxy
from websockets.proxy import get_proxy, parse_proxy, prepare_connect_request
from websockets.uri import parse_uri

from sfl.errors import ConfigError, RunError, quoted
from sfl.transport.addresses import Address, format_address
from sfl.wire.link import one_line

NOT_YET = (502, 503, 504)  # what a proxy answers while there is no server behind it
_MOST_HEAD_BYTES = 16 * 2**10  # of the proxy's answer


def connect_through_proxy(to: Address, timeout_s: float) -> socket.socket | None:
    """Return a connection to a server through this machine's proxy; None: it needs none.

    This machine's own addresses, and those that ``no_proxy`` names, need none.

    Raises:
        ConfigError: the proxy's address is malformed, or not of HTTP.
        RunError: the proxy refuses.
        OSError: the proxy, or a server behind it, cannot be reached now.
    """
    uri = parse_uri(to.url)
    address = None if _is_this_machine(to.host) else get_proxy(uri)
    if address is None:
        return None
    try:
        proxy = parse_proxy(address)
        if proxy.scheme != "http":
            raise ValueError(proxy.scheme)
    except (InvalidProxy, ValueError) as error:
        shown = quoted(address.rpartition("@")[2])  # without a password
        raise ConfigError(
            f"the proxy that this machine's environment names, {shown}, is none of the form"
            " http://HOST:PORT; see https_proxy, http_proxy, no_proxy"
        ) from error
    name = f"the proxy at {format_address(proxy.host, proxy.port)}"
    try:
        sock = socket.create_connection((proxy.host, proxy.port), timeout=timeout_s)
    except OSError as error:
        raise OSError(f"{name}: {error.strerror or error}") from error
    try:
        sock.sendall(prepare_connect_request(proxy, uri))
        _check_answer(_head_of_answer(sock), name)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_this_machine(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _head_of_answer(sock: socket.socket) -> bytes:
    """Return the proxy's answer up to the empty line; what follows is the server's."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        if not (byte := sock.recv(1)) or len(head) == _MOST_HEAD_BYTES:
            raise ConnectionResetError("the proxy ends the connection")
        head += byte
    return head


def _check_answer(head: bytes, name: str) -> None:
    line = one_line(head.split(b"\r\n")[0].decode("latin-1"), 100)
    _, _, status = line.partition(" ")
    if status[:1] == "2":
        return
    if status[:3] in map(str, NOT_YET):
        raise ConnectionRefusedError(f"{name} says {line}")
    raise RunError(f"{name} says {line}")
