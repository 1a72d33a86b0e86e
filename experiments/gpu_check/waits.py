"""Whether a step waits for its GPU anywhere but where it is meant to.

``torch.cuda.set_sync_debug_mode`` turns each other wait into an error, as that of ``item()``. What
is meant to be waited for, ``sfl.model.transfer`` waits for with events, which it lets pass.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch

from experiments.gpu_check.worker import Seen
from sfl.conversation import step
from sfl.conversation.party import ClientParty
from sfl.wire.driver import Conversation


def without_other_waits(simulate: Callable[[], object]) -> Seen:
    """Simulate a run of one client, whose steps end with an error if they wait for more."""
    with _strict_steps() as strict:
        simulate()
    return f"{len(strict)} steps, in which nothing else was waited for", len(strict) > 0


@contextlib.contextmanager
def _strict_steps() -> Iterator[list[int]]:
    """Let steps of the one client be strict, from its second step on; append each of them.

    Both sides of a step are: the server computes while the client waits. The first step of the run
    prepares the device.
    """
    honest, strict = step.client_step, list[int]()

    def client_step(
        party: ClientParty, batch: step.Batch, meanwhile: Callable[[], object]
    ) -> Conversation[None]:
        if batch.at.round == batch.at.step == 0:
            yield from honest(party, batch, meanwhile)
            return
        with _no_other_waits(party.front.device):
            yield from honest(party, batch, meanwhile)
        strict.append(batch.at.step)

    with patch.object(step, "client_step", client_step):
        yield strict


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@contextlib.contextmanager
def _no_other_waits(device: torch.device) -> Iterator[None]:
    if not is_gpu(device):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
