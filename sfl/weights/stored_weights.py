"""``SharedWeights``: weights through a folder or bucket that all parties reach.

::

    sender                                receiver
    creates the object
    WEIGHTS_STORED {name, checksum}   ->  reads the object          with a link between them
                                          polls until it exists     without one

An object's path names run, round and weights. Its metadata repeat them, with a checksum, so that an
object that was put elsewhere or altered is refused.
"""

import threading
import time
from collections.abc import Callable, Collection

from sfl.errors import IntegrityError, ProtocolError, RunError, quoted
from sfl.files.checksum import checksum
from sfl.files.torch_reader import Buffer
from sfl.weights.exchange import WeightKey
from sfl.weights.object_store import Metadata, ObjectStore
from sfl.wire.blocking_calls import Calls
from sfl.wire.driver import Conversation, Gate, NoReconnects
from sfl.wire.link import Link
from sfl.wire.messages import MessageType

FIRST_LOOK_S, LONGEST_PAUSE_S = 0.05, 5.0  # between polls for an object without a notice
SAY_AFTER_S = 10.0


def object_path(key: WeightKey) -> str:
    """Return the path of a key's weights in the store."""
    when = "start" if key.at.round < 0 else f"round_{key.at.round:03d}"
    return f"{key.at.run}/{when}/{key.name}.pt"


def describe(key: WeightKey, data: bytes, samples: int) -> Metadata:
    """Return an object's metadata: run, round, name, client, samples and checksum."""
    client = key.name.removeprefix("client_")
    return {
        "run": key.at.run,
        "round": str(key.at.round),
        "name": key.name,
        "client": client if client.isdigit() else "all",
        "samples": str(samples),
        "checksum": checksum(data),
    }


class Threads(NoReconnects):
    """A network without connections, whose gates are opened by threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> None:
        """Wait until a gate opens."""
        with self._changed:
            self._changed.wait_for(lambda: any(gate() for gate in gates))


class SharedWeights:
    """Weights as objects, at one client or for one client at a server."""

    def __init__(
        self,
        objects: ObjectStore,
        link: Link | None,
        calls: Calls,
        *,
        patience_s: float,
        say: Callable[[str], None],
        most_bytes: int | None = None,
    ) -> None:
        """``link`` leads to the receiver; ``patience_s`` bounds the wait for an object.

        Objects of more than ``most_bytes`` are refused.
        """
        self._most_bytes = most_bytes
        self._objects = objects
        self._link = link
        self._calls = calls
        self._patience_s = patience_s
        self._say = say

    def put(self, key: WeightKey, data: bytes, samples: int = 0) -> Conversation[None]:
        path, metadata = object_path(key), describe(key, data, samples)
        yield from self._calls.run_once(
            f"{path} {metadata['checksum']}", lambda: self._objects.create(path, data, metadata)
        )
        yield from self.pass_on(key, data)

    def pass_on(self, key: WeightKey, data: bytes) -> Conversation[None]:
        yield from ()
        if self._link is not None:
            content = {"name": key.name, "checksum": checksum(data)}
            self._link.send_message_as_json(MessageType.WEIGHTS_STORED, content=content, at=key.at)

    def get(self, key: WeightKey, held: bytes = b"") -> Conversation[Buffer]:
        announced = ""
        if self._link is not None:
            yield self._link
            notice = self._link.receive_message_as_json(MessageType.WEIGHTS_STORED, at=key.at)
            announced = notice.get("checksum", str)
            if (name := notice.get("name", str)) != key.name:
                raise ProtocolError(
                    f"{self._link.peer_title} stored {quoted(name, 40)}, not {key.name}"
                )
            if held and checksum(held) == announced:
                return held
        data, metadata = yield from self._calls.run(lambda: self._look_for(key))
        self._check(key, data, metadata, announced)
        return data

    def _look_for(self, key: WeightKey) -> tuple[bytes, Metadata]:
        """Read an object, polling until it exists."""
        path, started, pause_s, said = object_path(key), time.monotonic(), FIRST_LOOK_S, False
        while (found := self._objects.read(path, self._most_bytes)) is None:
            waited_s = time.monotonic() - started
            if waited_s > self._patience_s:
                why = f"{self._objects.title}/{path} did not come within {self._patience_s:g}"
                if self._link is not None:  # the peer announced it, so it is the peer's fault
                    raise ProtocolError(f"{why} seconds after {self._link.peer_title} stored it")
                raise RunError(f"{why} seconds")
            if waited_s > SAY_AFTER_S and not said:
                said = True
                self._say(f"waiting for {self._objects.title}/{path}")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)
        return found

    def _check(self, key: WeightKey, data: bytes, metadata: Metadata, announced: str) -> None:
        where = f"{self._objects.title}/{object_path(key)}"
        wanted = describe(key, data, 0)
        for field in ("run", "round", "name"):
            if metadata.get(field) != wanted[field]:
                raise IntegrityError(
                    f"{where}: is of {field} {quoted(metadata.get(field))}, not {wanted[field]!r}"
                )
        ours = wanted["checksum"]
        if metadata.get("checksum") != ours or announced not in ("", ours):
            raise IntegrityError(f"{where}: is damaged: its checksum is not the one it was given")
