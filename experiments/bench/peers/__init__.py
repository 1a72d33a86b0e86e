"""The ways to train over a cut that ``experiments.bench`` compares with ours.

One program each, as plain as its users write it, on its public library::

    python -m experiments.bench.peers.NAME SOCKET [run options]

starts whatever it needs, trains ``--clients`` clients, and ends when the bench says so; each client
hears from the bench, over ``SOCKET``, how many steps to take next (``blocks.serve_blocks``).
"""
