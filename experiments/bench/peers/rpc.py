"""Remote calls with a gradient that crosses processes: torch.distributed.rpc, as its tutorials do.

python -m experiments.bench.peers.rpc SOCKET [run options]

The back is a module on the server that the client calls; distributed autograd goes back through the
call, and one distributed optimiser updates both halves.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, multiprocessing, nn
from torch.distributed import autograd, rpc
from torch.distributed.optim import DistributedOptimizer
from torch.distributed.rpc import RRef

from experiments.bench.peers.blocks import arguments, serve_blocks
from experiments.bench.peers.task import Task


class Back(nn.Module):
    """A client's back, on the server. z: (B, *cut) float32, y: (B,) int64."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.blocks(z), y)

    def parameter_rrefs(self) -> list[RRef]:
        return [RRef(parameter) for parameter in self.parameters()]


backs: list[Back] = []  # on the server, which fills it before anybody calls


def back_of(client: int) -> Back:
    return backs[client]


def train(task: Task, client: int, address: str) -> None:
    front, batches = task.front().blocks, task.batches(client)
    back = rpc.remote("server", back_of, args=(client,))
    parameters = [RRef(parameter) for parameter in front.parameters()]
    parameters += back.rpc_sync().parameter_rrefs()
    optimizer = DistributedOptimizer(torch.optim.Adam, parameters, lr=task.run.lr, fused=True)

    def step() -> None:
        x, y = next(batches)
        with autograd.context() as context:
            loss = back.rpc_sync().forward(front(x), y)
            autograd.backward(context, [loss])
            optimizer.step(context)

    serve_blocks(address, client, step)


def run(rank: int, meeting: str, address: str, options: Sequence[str]) -> None:
    """Be the server, which is rank 0, or one of the clients."""
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.captureWarnings(True)  # no filter stops PyTorch's about what its own rpc uses
    task = Task("rpc", options)
    if rank == 0:
        backs.extend(Back(task.back().blocks) for _ in range(task.run.clients))
    rpc.init_rpc(
        "server" if rank == 0 else f"client-{rank - 1}",
        rank=rank,
        world_size=1 + task.run.clients,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=meeting,
            rpc_timeout=0,  # none: the bench stops all processes between its questions
        ),
    )
    if rank > 0:
        train(task, rank - 1, address)
    rpc.shutdown()  # when everyone has come here


def main() -> None:
    address, options = arguments()
    num_processes = 1 + Task("rpc", options).run.clients
    with tempfile.TemporaryDirectory(dir=Path(address).parent) as folder:
        meeting = f"file://{folder}/meeting"
        multiprocessing.spawn(run, (meeting, address, options), num_processes, daemon=True)


if __name__ == "__main__":
    main()
