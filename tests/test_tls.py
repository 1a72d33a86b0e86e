"""TLS: who is trusted, and what is refused."""

import datetime
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from sfl.errors import ConfigError
from sfl.nodes import ServerNode
from sfl.transport.addresses import is_loopback
from sfl.transport.guard import exposure, guard_of
from sfl.transport.tokens import SERVER
from tests.support.certificates import Certificates
from tests.support.handshakes import FAST, TOKEN, answers, token_file
from tests.support.launch import Launcher, Program, wait_for


@pytest.fixture
def secured(launcher: Launcher, certificates: Certificates) -> Iterator[Program]:
    server = launcher.server(*FAST, "--clients", 1, *certificates.issue("server"))
    wait_for(server, "listening")
    yield server
    launcher.client("--tls-ca", certificates.trust).ended_with(0)  # whatever was tried before
    server.ended_with(0)


def test_plain_text_to_a_tls_port_is_answered_and_nothing_else(
    launcher: Launcher, secured: Program
) -> None:
    line = launcher.client().ended_with(1)
    assert line.endswith("the server refused: this server speaks TLS alone: give --tls-ca")
    assert answers(launcher.port, b"GET / HTTP/1.1\r\n\r\n")[-1].content.startswith("this server")


def test_tls_to_a_plain_port_is_never_tried_again_in_plain_text(
    launcher: Launcher, certificates: Certificates
) -> None:
    server = launcher.server(*FAST, "--clients", 1)
    wait_for(server, "listening")
    line = launcher.client("--tls-ca", certificates.trust).ended_with(1)
    assert "the server at 127.0.0.1 does not speak TLS 1.3 with us (wrong version number)" in line
    log = next(launcher.folder.glob("server/*/server_log.txt")).read_text()
    assert log.count("turned away") == 1
    launcher.client().ended_with(0)
    server.ended_with(0)


def test_a_foreign_certificate_is_not_trusted(
    launcher: Launcher, secured: Program, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.pem"
    trustme.CA().cert_pem.write_to_path(foreign)
    line = launcher.client("--tls-ca", foreign).ended_with(1)
    assert "the certificate of the server at 127.0.0.1 is not to be trusted" in line


@pytest.mark.parametrize(
    ("hosts", "options", "why"),
    [
        (
            ["127.0.0.1"],
            {"not_after": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)},
            "expired",
        ),
        (["other.example"], {}, "IP address mismatch"),
    ],
)
def test_a_certificate_that_does_not_fit_is_not_trusted(
    launcher: Launcher,
    certificates: Certificates,
    hosts: list[str],
    options: dict[str, object],
    why: str,
) -> None:
    server = launcher.server(*FAST, "--clients", 1, *certificates.issue("bad", *hosts, **options))
    wait_for(server, "listening")
    assert why in launcher.client("--tls-ca", certificates.trust).ended_with(1)


def test_older_tls_is_refused(
    launcher: Launcher, secured: Program, certificates: Certificates
) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1):
        context = ssl.create_default_context(cafile=str(certificates.trust))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
            context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the server that refuses
        with (
            socket.create_connection(("127.0.0.1", launcher.port), timeout=20) as sock,
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            context.wrap_socket(sock, server_hostname="127.0.0.1")


def test_only_clients_with_a_certificate_may_connect_if_one_is_wanted(
    launcher: Launcher, certificates: Certificates, tmp_path: Path
) -> None:
    wants = ["--tls-client-ca", certificates.trust, *certificates.issue("server")]
    server = launcher.server(*FAST, "--clients", 1, *wants)
    wait_for(server, "listening")
    trust = ["--tls-ca", certificates.trust]
    assert "the server refused us: " in launcher.client(*trust).ended_with(1)
    foreign = Certificates(tmp_path / "foreign")
    foreign.folder.mkdir()
    assert "refused us: " in launcher.client(*trust, *foreign.issue("mine")).ended_with(1)
    launcher.client(*trust, *certificates.issue("mine")).ended_with(0)
    server.ended_with(0)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--tls-cert", "nothing.pem", "--tls-key", "nothing.key"], "No such file"),
        (["--tls-cert", "nothing.pem"], "give both, or none"),
        (["--tls-client-ca", "ca.pem"], "is for a server with --tls-cert"),
        (["--tls-ca", "ca.pem"], "is for clients, and for --role main, hop:N and task:NAME"),
        (["--token-file", "nothing"], "No such file"),
        (["--host", "0.0.0.0"], "give --token-file"),
        (["--host", "::"], "give --token-file"),
    ],
)
def test_a_server_that_cannot_be_safe_does_not_start(
    launcher: Launcher, argv: list[str], why: str
) -> None:
    assert why in launcher.server(*argv).ended_with(2)
    assert not (launcher.folder / "server").exists()


def test_an_encrypted_key_is_refused_without_a_question(
    launcher: Launcher, certificates: Certificates
) -> None:
    own = certificates.issue("server")
    key = Path(str(own[3]))
    lines = key.read_text().replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    key.write_text(lines.replace("RSA ENCRYPTED", "ENCRYPTED").replace("EC ENCRYPTED", "ENCRYPTED"))
    assert "--tls-key" in launcher.server(*own).ended_with(2)


def test_what_is_said_of_a_server_that_others_can_reach(tmp_path: Path) -> None:
    path = str(token_file(tmp_path, TOKEN))
    assert exposure(ServerNode()) == ["only this machine can connect; --host 0.0.0.0 lets others"]
    (insecure, no_tls) = exposure(ServerNode(host="0.0.0.0", insecure=True))
    assert "whoever reaches the port can take part" in insecure
    assert "can read and alter what travels" in no_tls
    (line,) = exposure(ServerNode(host="0.0.0.0", token_file=path))
    assert "a token protects the start of a connection, not what follows" in line
    assert exposure(ServerNode(host="0.0.0.0", token_file=path, tls_cert="c", tls_key="k")) == []
    assert guard_of(ServerNode(host="0.0.0.0", insecure=True), SERVER).tokens is None
    with pytest.raises(ConfigError, match="--insecure"):
        guard_of(ServerNode(host="0.0.0.0"), SERVER)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "192.0.2.1", "")] == [False] * 4
