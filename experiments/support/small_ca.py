"""A small CA by openssl's command line, as docs/security.md gives it, for studies."""

import shutil
import subprocess
from pathlib import Path

from sfl.errors import ConfigError

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class SmallCA:
    """A CA of its own, and certificates that it issues, in one folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        if shutil.which("openssl") is None:
            raise ConfigError("this needs the program openssl: install it, or leave out TLS")
        self.folder, self._name = folder, name
        self.cert = folder / f"{name}.pem"
        folder.mkdir(parents=True, exist_ok=True)
        self._openssl(
            "req", "-x509", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "30",
            "-subj", "/CN=SFL CA",
        )  # fmt: skip

    def issue(self, name: str, *, days: int = 30, host: str = "127.0.0.1") -> list[str]:
        """Return the options that name a new certificate and its key; expired if ``days`` is 0."""
        (self.folder / f"{name}.ext").write_text(f"subjectAltName=IP:{host}\n")
        self._openssl(
            "req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        self._openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", f"{self._name}.pem",
            "-CAkey", f"{self._name}.key", "-CAcreateserial", "-days", str(days),
            "-extfile", f"{name}.ext", "-out", f"{name}.pem",
        )  # fmt: skip
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        return ["--tls-cert", str(cert), "--tls-key", str(key)]

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConfigError(f"openssl {arguments[0]}: {done.stderr.strip()[-200:]}")
