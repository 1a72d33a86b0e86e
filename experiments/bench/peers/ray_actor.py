"""Methods of a remote actor: Ray, the server an actor that holds the backs, every client a task.

python -m experiments.bench.peers.ray_actor SOCKET [run options]
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Sequence

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from experiments.bench.peers.blocks import arguments, serve_blocks
from experiments.bench.peers.halves import answer, update
from experiments.bench.peers.task import Task


@ray.remote
class Server:
    def __init__(self, options: Sequence[str]) -> None:
        task = Task("ray_actor", options)
        self.backs = [task.back() for _ in range(task.run.clients)]

    def train(self, client: int, z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and the gradient. z: (B, *cut) float32, y: (B,) int64."""
        back = self.backs[client]
        loss, grads = answer(back, torch.tensor(z), torch.tensor(y))
        back.optimizer.step()
        return loss, grads.numpy()


@ray.remote
def train(server: ActorHandle, client: int, address: str, options: Sequence[str]) -> None:
    task = Task("ray_actor", options)
    front, batches = task.front(), task.batches(client)

    def step() -> None:
        x, y = next(batches)
        z = front.blocks(x)
        _loss, grads = ray.get(server.train.remote(client, z.detach().numpy(), y.numpy()))
        update(front, z, torch.tensor(grads))

    serve_blocks(address, client, step)


def main() -> None:
    address, options = arguments()
    clients = Task("ray_actor", options).run.clients
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # else it writes one to the home
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder,  # short: sockets lie in it
        ray.init(
            num_cpus=1 + clients,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        ),
    ):
        server = Server.remote(options)
        ray.get([train.remote(server, k, address, options) for k in range(clients)])


if __name__ == "__main__":
    main()
