"""The least that a step takes over TCP: bare numbers that nothing names, checks, keeps or logs.

python -m experiments.bench.peers.sockets SOCKET [run options]

Both ends know what comes, and look for it again and again. As in our own programs a client makes
its next batch while the server works, and the server answers before it updates its back. Gradients
and updates are torch's own, as of all peers. What we take beyond this is what our messages, checks,
recovery and archive cost.
"""

import os
import selectors
import socket
import struct
from collections.abc import Sequence

import torch
from torch import Size, Tensor

from experiments.bench.peers.blocks import serve_blocks, spawn_all
from experiments.bench.peers.halves import answer, update
from experiments.bench.peers.task import Task

COUNT = struct.Struct("<q")  # of the samples in a batch: an epoch's last may be smaller


def send(sock: socket.socket, *parts: memoryview) -> int:
    left = [part.cast("B") for part in parts]
    num_bytes = sum(map(len, left))
    while left:
        try:
            sent = sock.sendmsg(left)
        except BlockingIOError:
            os.sched_yield()
            continue
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if left:
            left[0] = left[0][sent:]
    return num_bytes


def receive(sock: socket.socket, buffer: memoryview) -> None:
    left = buffer.cast("B")
    while len(left):
        try:
            received = sock.recv_into(left)
        except BlockingIOError:
            os.sched_yield()
            continue
        if not received:
            raise EOFError
        left = left[received:]


def receive_tensor(sock: socket.socket, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(*shape, dtype=dtype)
    receive(sock, tensor.numpy().data)
    return tensor


def cut_shape(task: Task) -> Size:
    x, _ = next(task.batches(0))
    return task.front().blocks(x).shape[1:]


def run_server(_: int, listener: socket.socket, options: Sequence[str]) -> None:
    task = Task("sockets", options)
    shape = cut_shape(task)
    with selectors.DefaultSelector() as selector:
        for _client in range(task.run.clients):
            sock, _address = listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sock, selectors.EVENT_READ, task.back())
        count = bytearray(COUNT.size)
        while True:
            for key, _events in selector.select(0):
                sock, back = key.fileobj, key.data
                assert isinstance(sock, socket.socket)
                receive(sock, memoryview(count))
                num_samples = COUNT.unpack(count)[0]
                y = receive_tensor(sock, (num_samples,), torch.int64)
                z = receive_tensor(sock, (num_samples, *shape), torch.float32)
                _loss, grads = answer(back, z, y)
                send(sock, grads.numpy().data)
                back.optimizer.step()
            os.sched_yield()


def run_client(client: int, port: int, address: str, options: Sequence[str]) -> None:
    task = Task("sockets", options)
    front, batches = task.front(), task.batches(client)
    following = [next(batches)]
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def step() -> int:
            x, y = following.pop()
            z = front.blocks(x)
            head = memoryview(COUNT.pack(len(y)))
            num_bytes = send(sock, head, y.numpy().data, z.detach().numpy().data)
            following.append(next(batches))
            grads = receive_tensor(sock, z.shape, torch.float32)
            update(front, z, grads)
            return num_bytes + grads.nbytes

        serve_blocks(address, client, step)


if __name__ == "__main__":
    spawn_all("sockets", run_server, run_client)
