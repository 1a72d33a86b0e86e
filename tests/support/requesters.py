"""A requester of split inference that a test drives message by message."""

from pathlib import Path

import pytest
import torch

from sfl.conversation.inference import InferenceParty, client_begin, client_infer
from sfl.errors import PeerFailed
from sfl.files.torch_file import encode_file
from sfl.model.topology import Holder
from sfl.nodes import ClientNode
from sfl.trained.models import read_front
from sfl.transport.connection import Connection
from sfl.values import Position
from sfl.wire.driver import run_blocking
from sfl.wire.messages import MessageType

CPU = torch.device("cpu")


class Requester:
    """A connected requester that may misbehave."""

    def __init__(self, link: Connection, front: Path, *, begins: bool) -> None:
        self.front = read_front([str(front)], ClientNode(device="cpu"), CPU)
        self.link = link
        self.link.peer_name = "server"
        self.party = InferenceParty(
            holder=Holder.CLIENT,
            link=self.link,
            split=self.front.split,
            own_segments=self.front.segments,
        )
        self.offer = run_blocking(client_begin(self.party, 1.0)) if begins else None
        self.at = self.offer.start._replace(step=0) if self.offer else Position("r", 0, 0)

    def infer(self, size: int = 4, x: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.zeros(size, 1, 28, 28) if x is None else x
        outputs = run_blocking(client_infer(self.party, x, self.at))
        self.at = self.at._replace(step=self.at.step + 1)
        return outputs

    def send(self, size: int, tensor: torch.Tensor | None = None) -> None:
        self.link.send_message_as_json(
            MessageType.INFERENCE_BATCH, content={"samples": size}, at=self.at
        )
        if tensor is not None:
            self.link.send_file(
                MessageType.INFERENCE_FEATURES, encode_file(tensor).data, at=self.at
            )

    def refused(self) -> str:
        with pytest.raises(PeerFailed) as error:
            self.link.receive_message_as_json(MessageType.INFERENCE_OUTPUTS)
        return str(error.value)
