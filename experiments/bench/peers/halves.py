"""What the two ends of a cut compute in a step, when they are two processes."""

from torch import Tensor, nn

from experiments.bench.peers.task import Half


def answer(back: Half, z: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Return the loss and the gradient at the cut, and leave the back ready for its update.

    z and the gradient: (B, *cut) float32, y: (B,) int64.
    """
    cut = z.detach().requires_grad_()
    loss = nn.functional.cross_entropy(back.blocks(cut), y)
    back.optimizer.zero_grad()
    loss.backward()
    assert cut.grad is not None
    return loss.item(), cut.grad


def update(front: Half, z: Tensor, grads: Tensor) -> None:
    """Take the optimiser's step on the front, whose output was z: (B, *cut) float32."""
    front.optimizer.zero_grad()
    z.backward(grads)
    front.optimizer.step()
