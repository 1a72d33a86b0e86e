"""Pickled objects over MPI: mpi4py, rank 0 the server, the others the clients.

python -m experiments.bench.peers.mpi SOCKET [run options]

It runs itself under ``mpiexec``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments.bench.peers.blocks import arguments, serve_blocks
from experiments.bench.peers.halves import answer, update
from experiments.bench.peers.task import Task

if TYPE_CHECKING:  # importing it starts MPI
    from mpi4py import MPI

RANKED = "--ranked"  # first of the options in the processes that mpiexec starts


def run_server(comm: "MPI.Intracomm", task: Task) -> None:
    backs = [task.back() for _ in range(task.run.clients)]
    training = len(backs)
    while training:
        request = comm.recv()  # from whichever client asks first
        if request is None:
            training -= 1
            continue
        client, z, y = request
        loss, grads = answer(backs[client], torch.from_numpy(z), torch.from_numpy(y))
        comm.send((loss, grads.numpy()), dest=1 + client)
        backs[client].optimizer.step()


def run_client(comm: "MPI.Intracomm", task: Task, address: str) -> None:
    client = comm.rank - 1
    front, batches = task.front(), task.batches(client)

    def step() -> None:
        x, y = next(batches)
        z = front.blocks(x)
        comm.send((client, z.detach().numpy(), y.numpy()), dest=0)
        _loss, grads = comm.recv(source=0)
        update(front, z, torch.from_numpy(grads))

    serve_blocks(address, client, step)
    comm.send(None, dest=0)


def launcher(num_processes: int) -> list[str]:
    """Return the command that starts as many processes, after the manual of the MPI at hand."""
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    mpiexec = shutil.which("mpiexec", path=search)
    if mpiexec is None:
        raise SystemExit("mpi4py is there, but no mpiexec: install an MPI, such as Open MPI")
    command = [mpiexec, "-n", str(num_processes)]
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True)
    if "Open MPI" in version.stdout:
        command += ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        if num_processes > len(os.sched_getaffinity(0)):  # a process that waits spins
            command += ["--mca", "mpi_yield_when_idle", "1"]
    return command


def main() -> None:
    address, options = arguments()
    if options[:1] != [RANKED]:
        command = launcher(1 + Task("mpi", options).run.clients)
        own = (sys.executable, "-m", "mpi4py", "-m", "experiments.bench.peers.mpi", address, RANKED)
        os.execv(command[0], [*command, *own, *options])
    from mpi4py import MPI

    comm, task = MPI.COMM_WORLD, Task("mpi", options[1:])
    if comm.rank == 0:
        run_server(comm, task)
    else:
        run_client(comm, task, address)


if __name__ == "__main__":
    main()
