"""The exception tree. Every error that SFL raises on purpose is an ``SflError``.

::

    SflError
     |- ConfigError        what was typed cannot be run as it stands           (exit code 2)
     |- DataError          the data are not there, or are not what was asked for
     |- RunError           the run cannot go on: disk, port, a client that left
     |   `- NotYet         what was asked for may be had a little later
     |- AuthError          the peer is not who it must be, or TLS cannot be agreed on
     |- StepFailed         a step of the model cannot be computed
     |- ProtocolError      the peer sent something that it must not send
     |   |- NotFinite      ... NaN, infinity, or numbers whose squares overflow
     |   `- OtherVersion   ... since it speaks another version of the protocol
     |- ConnectionLost     the peer is gone, or silent for too long
     |- PeerFailed         the peer said that it cannot go on, and why
     |   |- PeerCannot     ... for a reason that recurs whenever it tries again
     |   `- PeerStopped    ... for a reason of its own
     |       |- PeerLeft   ... since it was told to stop; it may come back
     |       `- LetGo      the peer closed this connection, and takes a new one
     `- IntegrityError     a file or payload is not what its sender or writer made
         `- Damaged        it changed on its way here

``str(error)`` is one line that a user can read: what came, what was wanted, what to do.
"""

import os
import traceback
from pathlib import Path

_NOT_A_USERS = (str(Path(__file__).parent), str(Path(traceback.__file__).parent), "<")
_TORCH = f"{os.sep}site-packages{os.sep}torch{os.sep}"


class SflError(Exception):
    """Base of every error that SFL raises on purpose."""


class ConfigError(SflError):
    """An option, or a combination of options, that cannot be run. Exit code 2."""


class DataError(SflError):
    """A data set that is not there, cannot be read, or does not fit the run."""


class RunError(SflError):
    """The run cannot start or go on on this machine: port, folder, disk, a client that left."""


class NotYet(RunError):
    """What a peer asks for may be had a little later."""


class AuthError(SflError):
    """The peer has not shown that it has the secret, or a certificate that we trust."""


class ProtocolError(SflError):
    """The peer broke the protocol: wrong bytes, wrong message, wrong moment, wrong shape."""


class NotFinite(ProtocolError):
    """The peer sent NaN, infinity, or numbers whose squares overflow float32."""


class StepFailed(SflError):
    """A step cannot be computed: a block raises, or what it gives is not finite."""


class OtherVersion(ProtocolError):
    """The peer speaks another version of the protocol."""

    def __init__(self, text: str, *, version: int, answer: str) -> None:
        super().__init__(text)
        self.version = version
        self.answer = answer  # what to say to the peer, in its version


class ConnectionLost(SflError):
    """The connection ended, or nothing came over it before its deadline."""


class PeerFailed(SflError):
    """The peer ended the run or turned us away; the text is the peer's reason."""


class PeerCannot(PeerFailed):
    """The peer cannot compute its part: it would fail again."""


class PeerStopped(PeerFailed):
    """The peer stopped, without a fault of ours."""


class PeerLeft(PeerStopped):
    """The peer was told to stop, and may come back."""


class LetGo(PeerStopped):
    """The peer closed this connection, without a fault of ours, and takes a new one."""


class IntegrityError(SflError):
    """A payload or file is damaged: its bytes are not those that were sent or written."""


class Damaged(IntegrityError):
    """A message changed on its way: a new connection is made, and it is sent again."""


# What may go wrong with one peer, of which the others need not notice anything.
PEER_ERRORS = (
    AuthError, ConnectionLost, PeerFailed, ProtocolError, IntegrityError, StepFailed,
)  # fmt: skip
# What happens again to the same client with the same data and model.
RECURRING = (NotFinite, StepFailed, PeerCannot)
# What a new connection may mend.
PASSING = (ConnectionLost, PeerStopped, Damaged)


CUT = "..."  # where a text was cut


def shortened(text: object, most: int) -> str:
    """Return a text in at most so many characters; a longer one is cut, between words if it can."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    kept = whole[: most - len(CUT) + 1].rpartition(" ")[0]
    return kept + CUT if len(kept) > most // 2 else whole[:most]


def quoted(value: object, most: int = 60) -> str:
    """Return a value that somebody gave, for a message."""
    return repr(shortened(value, most)) if isinstance(value, str) else shortened(repr(value), most)


def reason_of(error: BaseException) -> str:
    """Return in one line why a party ends, for its log, its peers and its user."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, SflError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def told(error: BaseException) -> str:
    """Return in one line what a user's own code raised, and where in it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if not f.filename.startswith(_NOT_A_USERS) and _TORCH not in f.filename
    ]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return reason_of(error).rstrip(": ") + where


def counted(number: int, noun: str) -> str:
    """Return ``1 client``, ``3 clients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
