"""``WEIGHT_STORES``: the values of ``--weights``, and how to open each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import ConfigError
from sfl.registry import unknown_name
from sfl.weights.bucket import Bucket, parse_address
from sfl.weights.exchange import SocketWeights, WeightStore
from sfl.weights.object_store import Directory, ObjectStore
from sfl.weights.stored_weights import SharedWeights
from sfl.wire.blocking_calls import Calls
from sfl.wire.link import Link

SOCKET = "socket"


def _directory(
    address: str, scratch: Path, timeout_s: float, say: Callable[[str], None]
) -> Directory:
    return Directory(address.removeprefix("dir:"))


def _bucket(address: str, scratch: Path, timeout_s: float, say: Callable[[str], None]) -> Bucket:
    return Bucket(address, scratch, timeout_s=timeout_s, say=say)


# Prefix of the address -> function that opens such a place; a socket needs none.
PLACES: dict[str, Callable[[str, Path, float, Callable[[str], None]], ObjectStore]] = {
    "dir": _directory,
    "gs": _bucket,
}
WEIGHT_STORES = (SOCKET, *PLACES)


def check_address(address: str) -> str:
    """Return an address of weights after checking its form.

    Raises:
        ConfigError: it is malformed.
    """
    if address == SOCKET:
        return address
    kind, colon, rest = address.partition(":")
    if not colon or kind not in PLACES:
        raise unknown_name("weight store", address, ("socket", "dir:PATH", "gs://BUCKET/PREFIX"))
    if kind == "dir" and not rest:
        raise ConfigError(f"--weights {address}: give a folder, dir:PATH")
    if kind == "gs":
        if not rest.startswith("//"):
            raise ConfigError(f"--weights {address}: give gs://BUCKET/PREFIX")
        parse_address(address)
    return address


def open_place(
    address: str, scratch: Path, *, timeout_s: float, say: Callable[[str], None]
) -> ObjectStore | None:
    """Return the place that an address names; None for a socket.

    ``scratch`` is a folder for downloads, ``timeout_s`` the deadline of each call.

    Raises:
        ConfigError: the address is malformed, or the place's library is not installed.
    """
    if check_address(address) == SOCKET:
        return None
    return PLACES[address.partition(":")[0]](address, scratch, timeout_s, say)


@dataclass(frozen=True)
class StoreOptions:
    """The options of a party's store, apart from the link to its peer."""

    address: str
    scratch: Path  # a folder for downloads
    timeout_s: float  # of each call
    patience_s: float  # for an object that nobody announces
    say: Callable[[str], None]

    def open_place(self) -> ObjectStore | None:
        return open_place(self.address, self.scratch, timeout_s=self.timeout_s, say=self.say)


def store_maker(
    place: ObjectStore | None,
    options: StoreOptions,
    wake: Callable[[], None] | None = None,
) -> Callable[[Link | None, int], WeightStore]:
    """Return a function that makes a party's store from its link and the size limit of a file.

    The stores of one process share their ``Calls``, which get ``wake``. Without a link, objects are
    found by polling.
    """
    calls = Calls(wake)

    def make(link: Link | None, most_bytes: int) -> WeightStore:
        if place is not None:
            return SharedWeights(
                place,
                link,
                calls,
                patience_s=options.patience_s,
                say=options.say,
                most_bytes=most_bytes,
            )
        assert link is not None
        return SocketWeights(link)

    return make
