"""What a page has sent: the messages in it, and whether a drawing is among the bytes."""

import io

import numpy as np
import torch

from sfl.conversation.inference import described
from sfl.files.torch_file import encode
from sfl.interactive.run import Run
from sfl.wire.framing import Decoder
from sfl.wire.messages import Limits, Message, MessageType


def messages_in(data: bytes) -> list[Message]:
    """Return the messages in what was sent, without one that is cut off."""
    decoder = Decoder(Limits(payload_bytes=dict.fromkeys(MessageType, 10**6)))
    return [*decoder.messages_of(data)]


def check_nothing_else(sent: list[Message], run: Run) -> None:
    """Check that messages hold activations, and beside them only what any page sends."""
    hello = described(run.split)
    for message in sent:
        if message.type is MessageType.REQUEST_INFERENCE:
            assert {name: message.content[name] for name in hello} == hello
            assert set(message.content) == {*hello, "heartbeat_s", "sfl"}
        elif message.type is MessageType.INFERENCE_FEATURES:
            assert message.content == ""
            activations = torch.load(io.BytesIO(message.payload), weights_only=True)
            assert activations.shape == (1, *run.split.features_sample(0).shape)
            assert bytes(message.payload) == bytes(encode(activations))
        else:
            assert message.content in ("", {"samples": 1})
            assert message.type in (MessageType.INFERENCE_BATCH, MessageType.HEARTBEAT)


def rows_found(data: bytes, run: Run, pixels: list[int]) -> set[str]:
    """Return in which forms a row of a drawing is in what was sent."""
    image = np.array(pixels, np.uint8).reshape(run.normalisation.input_shape)
    floats = image.astype(np.float32) / 255
    known = run.normalisation
    mean, std = np.float32(known.mean[0]), np.float32(known.std[0])
    forms = {"bytes": image, "floats": floats, "normalised": (floats - mean) / std}
    forms |= {"doubles": image / 255}
    rows = {name: form.reshape(-1, image.shape[-1]) for name, form in forms.items()}
    return {
        name
        for name, form in rows.items()
        if any(row.tobytes() in data for row in form if len(set(row.tolist())) > 2)
    }
