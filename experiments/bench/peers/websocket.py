"""JSON messages over a WebSocket, tensors as base64 of what ``torch.save`` writes: websockets.

python -m experiments.bench.peers.websocket SOCKET [run options]

Without the library's default compression, which takes a third off the bytes and makes a step of the
MLP at batch 128 more than twice as long. The server is the library's asyncio one: its threaded one
is no faster.
"""

import asyncio
import base64
import io
import json
import socket
from collections.abc import Sequence

import torch
from torch import Tensor
from websockets.asyncio.server import ServerConnection, serve
from websockets.sync.client import connect

from experiments.bench.peers.blocks import serve_blocks, spawn_all
from experiments.bench.peers.halves import answer, update
from experiments.bench.peers.task import Task

# No limit on a message, and no pings: the bench stops all processes between its questions.
OPTIONS = {"compression": None, "max_size": None, "ping_interval": None}


def to_text(tensor: Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


async def serve_backs(task: Task, listener: socket.socket) -> None:
    async def serve_back(client: ServerConnection) -> None:
        back = task.back()
        async for message in client:
            request = json.loads(message)
            z, y = from_text(request["activations"]), from_text(request["labels"])
            loss, grads = answer(back, z, y)
            await client.send(json.dumps({"loss": loss, "gradients": to_text(grads)}))
            back.optimizer.step()

    async with serve(serve_back, sock=listener, **OPTIONS) as server:
        await server.serve_forever()


def run_server(_: int, listener: socket.socket, options: Sequence[str]) -> None:
    asyncio.run(serve_backs(Task("websocket", options), listener))


def run_client(client: int, port: int, address: str, options: Sequence[str]) -> None:
    task = Task("websocket", options)
    front, batches = task.front(), task.batches(client)
    url = f"ws://127.0.0.1:{port}"
    with connect(url, proxy=None, **OPTIONS, open_timeout=60) as server:

        def step() -> int:
            x, y = next(batches)
            z = front.blocks(x)
            request = json.dumps({"labels": to_text(y), "activations": to_text(z.detach())})
            server.send(request)
            reply = server.recv()
            update(front, z, from_text(json.loads(reply)["gradients"]))
            return len(request) + len(reply)

        serve_blocks(address, client, step)


if __name__ == "__main__":
    spawn_all("websocket", run_server, run_client)
