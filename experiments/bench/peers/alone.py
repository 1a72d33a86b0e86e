"""The arithmetic alone: both halves in one process, one client after another.

python -m experiments.bench.peers.alone SOCKET [run options]
"""

from collections.abc import Callable

import torch
from torch import nn

from experiments.bench.peers.blocks import arguments, serve_blocks
from experiments.bench.peers.task import Task


def stepper(task: Task) -> Callable[[], None]:
    """Return a function that takes one step of each client, on the task's device."""
    clients = [(task.front(), task.back(), task.batches(k)) for k in range(task.run.clients)]

    def step() -> None:
        for front, back, batches in clients:
            x, y = (tensor.to(task.device) for tensor in next(batches))
            z = front.blocks(x)
            cut = z.detach().requires_grad_()
            loss = nn.functional.cross_entropy(back.blocks(cut), y)
            back.optimizer.zero_grad()
            loss.backward()
            back.optimizer.step()
            front.optimizer.zero_grad()
            torch.autograd.backward(z, cut.grad)
            front.optimizer.step()
            loss.item()

    return step


def main() -> None:
    address, options = arguments()
    serve_blocks(address, 0, stepper(Task("alone", options)))


if __name__ == "__main__":
    main()
