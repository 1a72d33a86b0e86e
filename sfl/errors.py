"""The exception tree. Every error that SFL raises on purpose is an ``SflError``.

::

    SflError
     |- ConfigError        what was typed cannot be run as it stands           (exit code 2)
     |- DataError          the data are not there, or are not what was asked for
     |- RunError           the run cannot go on: disk, port, a client that left
     |- AuthError          the peer is not who it must be, or TLS cannot be agreed on
     |- ProtocolError      the peer sent something that it must not send
     |- ConnectionLost     the peer is gone, or silent for too long
     |- PeerFailed         the peer said that it cannot go on, and why
     |   `- PeerStopped    ... for a reason of its own
     |       `- PeerLeft   ... since it was told to stop; it may come back
     `- IntegrityError     a file or payload is not what its sender or writer made
         `- Damaged        it changed on its way here

``str(error)`` is one line that a user can read: what came, what was wanted, what to do.
"""


class SflError(Exception):
    """Base of every error that SFL raises on purpose."""


class ConfigError(SflError):
    """An option, or a combination of options, that cannot be run. Exit code 2."""


class DataError(SflError):
    """A data set that is not there, cannot be read, or does not fit the run."""


class RunError(SflError):
    """The run cannot start or go on on this machine: port, folder, disk, a client that left."""


class AuthError(SflError):
    """The peer has not shown that it has the secret, or a certificate that we trust."""


class ProtocolError(SflError):
    """The peer broke the protocol: wrong bytes, wrong message, wrong moment, wrong shape."""


class ConnectionLost(SflError):
    """The connection ended, or nothing came over it before its deadline."""


class PeerFailed(SflError):
    """The peer ended the run or turned us away; the text is the peer's reason."""


class PeerStopped(PeerFailed):
    """The peer stopped, without a fault of ours."""


class PeerLeft(PeerStopped):
    """The peer was told to stop, and may come back."""


class IntegrityError(SflError):
    """A payload or file is damaged: its bytes are not those that were sent or written."""


class Damaged(IntegrityError):
    """A payload changed on its way: to be sent again."""


# What may go wrong with one peer, of which the others need not notice anything.
PEER_ERRORS = (AuthError, ConnectionLost, PeerFailed, ProtocolError, IntegrityError)
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
