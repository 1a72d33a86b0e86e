"""Certificates of a small CA."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import trustme


@dataclass
class Certificates:
    """A small CA, and files of what it has issued."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    def _write(self, name: str, blob: trustme.Blob) -> Path:
        path = self.folder / name
        blob.write_to_path(path)
        return path

    @cached_property
    def trust(self) -> Path:
        """The CA's file, written once: a program that starts reads it while another is started."""
        return self._write("ca.pem", self.ca.cert_pem)

    def issue(self, name: str, *hosts: str, **options: object) -> list[object]:
        """Return the options that name a new certificate and its key."""
        issued = self.ca.issue_cert(*(hosts or ["127.0.0.1", "localhost"]), **options)
        key = self._write(f"{name}.key", issued.private_key_pem)
        cert = self._write(f"{name}.pem", issued.cert_chain_pems[0])
        return ["--tls-cert", cert, "--tls-key", key]
