"""Addresses of servers, as a client types them."""

import pytest

from sfl.errors import ConfigError
from sfl.transport.addresses import Address, parse_url


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vm", Address("tcp", "vm", 8765)),
        ("vm:9", Address("tcp", "vm", 9)),
        ("tcp://[::1]:9/", Address("tcp", "::1", 9, "/")),
        ("ws://vm:9", Address("ws", "vm", 9)),
        ("WSS://vm/a?b=c", Address("wss", "vm", 8765, "/a?b=c")),
        ("mpi://", Address("mpi", "rank", 0)),
        ("rpc://vm:9/1/3", Address("rpc", "vm", 9, "/1/3")),
    ],
)
def test_an_address_names_transport_host_port_and_path(text: str, address: Address) -> None:
    assert parse_url(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "vm:0", "vm/path", "http://vm:9/", "ws://vm:9/#a", "ws://user@vm:9/", "ws://", "a b",
     "rpc://vm:9", "rpc://vm:9/1", "rpc://vm:9/a/b", "rpc://vm:9/0/3", "mpi:///x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address: give HOST"):
        parse_url(text)
