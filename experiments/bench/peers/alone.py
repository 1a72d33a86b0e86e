"""The arithmetic alone: both halves in one process, one client after another.

python -m experiments.bench.peers.alone SOCKET [run options]
"""

import torch
from torch import nn

from experiments.bench.peers.blocks import arguments, serve_blocks
from experiments.bench.peers.task import Task


def main() -> None:
    address, options = arguments()
    task = Task("alone", options)
    clients = [(task.front(), task.back(), task.batches(k)) for k in range(task.run.clients)]

    def step() -> None:
        for front, back, batches in clients:
            x, y = next(batches)
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

    serve_blocks(address, 0, step)


if __name__ == "__main__":
    main()
