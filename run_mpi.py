"""Run server and clients under ``mpirun``: ``mpirun -n 4 python -m mpi4py run_mpi.py ...``."""

import sys

from sfl.cli import main_mpi

if __name__ == "__main__":
    sys.exit(main_mpi())
