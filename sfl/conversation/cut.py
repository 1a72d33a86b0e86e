"""Send, receive, check and record a batch's tensors at a cut, in training and evaluation.

::

    sender: Cut.send                                 receiver: Cut.receive
      tensor -> file                             ->  file -> tensor, checked
    Cut.record: files to the archive                 Cut.record: files to the archive

Extension points: a defence changes the tensor at the start of ``encode``; a codec replaces
``encode_file`` there and ``decode_file`` in ``receive``. Neither exists yet.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, GRADS, LABELS
from sfl.conversation.party import Party
from sfl.errors import ProtocolError
from sfl.files.checksum import File
from sfl.files.torch_file import decode_file, encode_file
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.messages import Message, MessageType

TRAINING = {
    LABELS: MessageType.TRAINING_LABELS,
    ACTIVATIONS: MessageType.TRAINING_FEATURES,
    GRADS: MessageType.TRAINING_GRADS,
}
EVALUATION = {
    LABELS: MessageType.VALIDATION_LABELS,
    ACTIVATIONS: MessageType.VALIDATION_FEATURES,
}
_KIND_NAMES = {LABELS: "labels", ACTIVATIONS: "activations", GRADS: "gradients"}


class Cut:
    """One end of a cut, for one batch. Tensors are named by their kind in the archive.

    Labels are the task's; activations and their gradients: (B, *cut) float32.
    """

    def __init__(
        self,
        party: Party,
        at: Position,
        num_samples: int,
        messages: Mapping[str, MessageType] = TRAINING,
    ) -> None:
        """``at``: the step; its ``link`` is the cut."""
        self._party, self._messages = party, messages
        self.at = at
        z = party.split.features_spec(num_samples, at.link)
        self._specs = {LABELS: party.task.labels_spec(num_samples), ACTIVATIONS: z, GRADS: z}
        self._files: dict[str, File] = {}  # sent and received tensors, to be recorded

    def send(self, kind: str, tensor: Tensor, content: Any = "") -> None:
        """Send a tensor, with an optional JSON value."""
        self.send_file(kind, self.encode(kind, tensor), content)

    def encode(self, kind: str, tensor: Tensor) -> File:
        """Encode a tensor as the file that is sent and recorded."""
        file = self._files[kind] = encode_file(tensor)
        self._party.clock.lap("serialise")
        return file

    def send_file(self, kind: str, file: File, content: Any = "") -> None:
        """Send an encoded tensor."""
        self._party.link.send_file(
            self._messages[kind], file.data, content=content, at=self.at, checksum=file.checksum
        )
        self._party.clock.lap("send")

    def receive(self, kind: str) -> Conversation[tuple[Tensor, Message]]:
        """Receive a tensor; return it with its message.

        Raises:
            ProtocolError: it belongs to another step, or its labels are out of range.
            IntegrityError: the file holds no tensor of the expected shape and dtype.
            NotFinite: it holds NaN or infinity, and the run's policy is to reject them.
        """
        message = yield from self.receive_message(kind)
        name = f"the {_KIND_NAMES[kind]} of client {self.at.client}"
        with self._party.measure_compute():
            tensor, file = decode_file(message.file, self._specs[kind], name)
            self._check(kind, tensor, name)
        self._files[kind] = file
        self._party.clock.lap("load")
        return tensor, message

    def receive_message(self, kind: str) -> Conversation[Message]:
        """Receive a tensor's message without decoding it."""
        link = self._party.link
        yield link
        message = link.receive_file(self._messages[kind], at=self.at)
        self._party.end_wait()
        return message

    def _check(self, kind: str, tensor: Tensor, name: str) -> None:
        if kind != LABELS:
            self._party.check_finite([tensor], name, self.at)
            return
        if wrong := self._party.task.wrong_labels(tensor, self._party.split.num_classes):
            raise ProtocolError(f"{name} {wrong}")

    def record(self, order: int) -> None:
        """Hand the step's tensors to the archive; ``order`` counts the back's earlier steps."""
        tensors = {kind: (file, self._specs[kind]) for kind, file in self._files.items()}
        self._party.archive.record_step(tensors, self.at, order)
