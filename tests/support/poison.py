"""A client that does as it should, but for one tensor: the attacker of ``test_poison``.

``POISON=TRAINING_FEATURES:1.2:3e38`` fills with 3e38 what it sends with that message at step 2 of
round 1, and in a message without a file each float. The step is -1 where a message belongs to a
whole round; ``row`` behind it leaves all samples but the first as they are, ``told`` the file: each
float told with it is filled. ``main_staying`` does all as it should, but takes no leave.
"""

import functools
import io
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from sfl.cli import main_client
from sfl.files.torch_file import encode, encode_state
from sfl.values import Position
from sfl.weights.exchange import SocketWeights, WeightKey
from sfl.wire.link import Link
from sfl.wire.messages import MessageType

VARIABLE = "POISON"


class _Poison:
    """What to send, and when."""

    def __init__(self, text: str) -> None:
        kind, where, value, *more = text.split(":")
        self._one_row, self.is_of_figures = more == ["row"], more == ["told"]
        self._kind, self._value = MessageType(kind), float(value)
        self._when = tuple(map(int, where.split(".")))

    def is_due(self, kind: MessageType, at: Position) -> bool:
        return kind is self._kind and (at.round, at.step) == self._when

    def into(self, data: bytes) -> bytes:
        """Return the file with other values."""
        given = torch.load(io.BytesIO(bytes(data)), weights_only=True)
        if isinstance(given, dict):
            return encode_state({name: self._filled(tensor) for name, tensor in given.items()})
        return encode(self._filled(given))

    def into_figures(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a message's content with other floats."""
        return {k: self._value if isinstance(v, float) else v for k, v in content.items()}

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        tensor[: 1 if self._one_row else None] = self._value
        return tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``run_client.py`` with the poison of the environment."""
    poison = _Poison(os.environ[VARIABLE])
    send_file, tell, put = Link.send_file, Link.send_message_as_json, SocketWeights.put

    @functools.wraps(send_file)
    def sends(link: Link, kind: MessageType, data: bytes, *args: Any, **more: Any) -> None:
        if poison.is_due(kind, more.get("at", Position())):
            if poison.is_of_figures:
                more["content"] = poison.into_figures(more["content"])
            else:
                data, more["checksum"] = poison.into(data), ""
        send_file(link, kind, data, *args, **more)

    @functools.wraps(tell)
    def tells(link: Link, kind: MessageType, *args: Any, **more: Any) -> None:
        if poison.is_due(kind, more.get("at", Position())):
            more["content"] = poison.into_figures(more["content"])
        tell(link, kind, *args, **more)

    @functools.wraps(put)
    def puts(store: SocketWeights, key: WeightKey, data: bytes, samples: int = 0) -> Any:
        due = poison.is_due(MessageType.SEND_MODEL, key.at)
        return put(store, key, poison.into(data) if due else data, samples)

    Link.send_file, SocketWeights.put = sends, puts  # type: ignore[method-assign]
    Link.send_message_as_json = tells  # type: ignore[method-assign]
    return main_client(argv)


def main_staying(argv: Sequence[str] | None = None) -> int:
    """Run ``run_client.py``, and live on when the run is over."""
    tell = Link.send_message_as_json

    @functools.wraps(tell)
    def tells(link: Link, kind: MessageType, *args: Any, **more: Any) -> None:
        if kind is MessageType.UNREGISTER:
            time.sleep(3600)  # with a heart that beats: the test ends it
        tell(link, kind, *args, **more)

    Link.send_message_as_json = tells  # type: ignore[method-assign]
    return main_client(argv)
