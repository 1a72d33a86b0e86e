"""The exception tree. Every error that SFL raises on purpose is an ``SflError``.

::

    SflError
     |- ConfigError        options that cannot be run                        (exit code 2)
     |- DataError          the data are missing or do not fit
     |- RunError           the run cannot go on: disk, port, a client that left
     |   `- NotYet         a request came too early or too late; another one may succeed
     |- AuthError          the peer is not authenticated, or TLS fails
     |- StepFailed         a step of the model cannot be computed
     |- ProtocolError      the peer broke the protocol
     |   |- NotFinite      ... by NaN, infinity, or numbers whose squares overflow
     |   `- OtherVersion   ... by speaking another version of it
     |- ConnectionLost     the connection broke, or was silent for too long
     |   `- HasClosed      ... the peer closed it between two messages
     |- PeerFailed         the peer reported why it cannot go on
     |   |- PeerCannot     ... for a reason that a retry does not remove
     |   `- PeerStopped    ... for a reason of its own
     |       |- PeerLeft   ... it was told to stop, and may come back
     |       `- LetGo      ... it closed this connection, and accepts a new one
     |           `- Redirected  ... at another address
     `- IntegrityError     a file or payload differs from what was written or sent
         `- Damaged        ... it changed in transit

``str(error)`` is one line for the user: what came, what was wanted, what to do.
"""

import os
import re
import sys
import traceback
from pathlib import Path

_NOT_A_USERS = (str(Path(__file__).parent), str(Path(traceback.__file__).parent), "<")
_TORCH = f"{os.sep}site-packages{os.sep}torch{os.sep}"


class SflError(Exception):
    """Base of every error that SFL raises on purpose."""


class ConfigError(SflError):
    """Options that cannot be run. Exit code 2."""


class DataError(SflError):
    """The data set is missing, cannot be read, or does not fit the run."""


class RunError(SflError):
    """The run cannot start or continue on this machine: port, folder, disk, a client that left."""


class NotYet(RunError):
    """A peer's request came too early or too late; another one may succeed."""


class AuthError(SflError):
    """The peer has not proved that it has the secret, or a certificate that we trust."""


class ProtocolError(SflError):
    """The peer broke the protocol: wrong bytes, wrong message, wrong moment, wrong shape."""


class NotFinite(ProtocolError):
    """The peer sent NaN, infinity, or numbers whose squares overflow float32."""


class StepFailed(SflError):
    """A step cannot be computed: a block raises, or its output is not finite."""


class OtherVersion(ProtocolError):
    """The peer speaks another version of the protocol."""

    def __init__(self, text: str, *, version: int, answer: str) -> None:
        super().__init__(text)
        self.version = version
        self.answer = answer  # what to tell the peer, in its version


class ConnectionLost(SflError):
    """The connection ended, or nothing arrived before the deadline."""


class HasClosed(ConnectionLost):
    """The peer closed the connection between two messages."""


class PeerFailed(SflError):
    """The peer ended the run or refused us; the text is the peer's reason."""


class RunEnded(PeerFailed):
    """The server ended the run, which cannot be resumed."""


class PeerCannot(PeerFailed):
    """The peer cannot compute its part; a retry would fail too."""


class PeerStopped(PeerFailed):
    """The peer stopped; no fault of ours."""


class PeerLeft(PeerStopped):
    """The peer was told to stop, and may come back."""


class LetGo(PeerStopped):
    """The peer closed this connection, through no fault of ours, and accepts a new one."""


class Redirected(LetGo):
    """The server sends us to another of its processes; ``host`` "": on the same machine."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"the server sends us on, to port {port} of {host or 'the same host'}")
        self.host, self.port = host, port


class IntegrityError(SflError):
    """A payload or file is damaged: its bytes are not those that were sent or written."""


class Damaged(IntegrityError):
    """A message was damaged in transit; it is sent again over a new connection."""


# Errors that end one peer's part and leave the other peers unaffected.
PEER_ERRORS = (
    AuthError, ConnectionLost, PeerFailed, ProtocolError, IntegrityError, StepFailed,
)  # fmt: skip
# Errors that recur for the same client with the same data and model.
RECURRING = (NotFinite, StepFailed, PeerCannot)
# Errors that a new connection may resolve.
PASSING = (ConnectionLost, PeerStopped, Damaged)


CUT = "..."  # ends a shortened text


def shortened(text: object, most: int) -> str:
    """Return a text of at most ``most`` characters, cut between words if possible."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    kept = whole[: most - len(CUT) + 1].rpartition(" ")[0]
    return kept + CUT if len(kept) > most // 2 else whole[:most]


def quoted(value: object, most: int = 60) -> str:
    """Return the ``repr`` of an untrusted value, shortened, for a message."""
    return repr(shortened(value, most)) if isinstance(value, str) else shortened(repr(value), most)


WAS_INTERRUPTED = "it was interrupted"


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, as torch's exporter has in its errors


def reason_of(error: BaseException) -> str:
    """Return why a party ends, in one line, for its log, its peers and its user."""
    if isinstance(error, KeyboardInterrupt | GeneratorExit):  # the latter in a conversation's frame
        return WAS_INTERRUPTED
    if isinstance(error, SflError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return _COLOUR.sub("", f"{type(error).__name__}: {error}".partition("\n")[0])


def told(error: BaseException) -> str:
    """Return the error of a user's own code in one line, with the place in that code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if not f.filename.startswith(_NOT_A_USERS) and _TORCH not in f.filename
    ]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return reason_of(error).rstrip(": ") + where


# How a program is started in a clone; where the package is installed, it is called ``sfl-NAME``.
_IN_A_CLONE = {
    "server": "run_server.py",
    "client": "run_client.py",
    "mpi": "run_mpi.py",
    "simulate": "python -m experiments.simulate",
    "replay": "python -m experiments.replay",
    "export": "python -m experiments.export",
    "watch": "python -m experiments.watch",
    "predict": "python -m experiments.predict",
    "report": "python -m experiments.report",
}
# Package that is imported -> what pip installs it from, where the two names differ.
_INSTALLED_FROM = {"google": "google-cloud-storage"}
# Packages of extras, which requirements.txt leaves out -> what pip installs.
_EXTRAS = "cryptography", "mpi4py", "ray", "tensorboard", "wandb", "websockets"
_LEFT_OUT = {name: name for name in _EXTRAS}
_LEFT_OUT |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx onnxruntime onnxscript")


def is_clone() -> bool:
    """Return whether this package lies in a clone, beside the programs and requirements.txt."""
    return (Path(__file__).parent.parent / _IN_A_CLONE["server"]).is_file()


def command(program: str) -> str:
    """Return how the user starts a program, such as ``server``, by its name there."""
    return _IN_A_CLONE[program] if is_clone() else f"sfl-{program}"


def not_installed(package: str) -> ConfigError:
    """Return the error for a package that is missing, with what to do."""
    what, hint = _INSTALLED_FROM.get(package, package), ""
    if package in _LEFT_OUT:
        what = _LEFT_OUT[package]
    elif is_clone():
        what, hint = "-r requirements.txt", "start the program with .venv/bin/python, or "
    return ConfigError(
        f"{package} is not installed for {sys.executable}: {hint}install it:"
        f" {sys.executable} -m pip install {what}"
    )


def counted(number: int, noun: str) -> str:
    """Return ``1 client``, ``3 clients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def after_round(round_index: int) -> str:
    """Return ``after round 3`` of index 2: people count rounds from 1."""
    return f"after round {round_index + 1}" if round_index >= 0 else "before the first round"


def duration(seconds: float) -> str:
    """Return ``12 s``, ``3 min 5 s``, ``2 h 10 min`` or ``3 d 4 h``."""
    whole = int(seconds)
    for unit, lower, size, count in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // count} {lower}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
