"""Random draws that depend on their purpose and place, never on what ran before.

Every draw comes from (seed, purpose, round, client, step, ...). So any step can be computed again
on any machine with the same result, and no generator state needs to be saved.
"""

import hashlib

import torch

# The purposes in use. A new one gets its line here, so that no two draws share a stream.
INITIAL_WEIGHTS = "initial weights"  # (client), of a model of each client's own
TASK = "task"  # (index): the seed of the model of each server but the main one
FUSION = "fusion"  # the initial weights of the projection behind a join
PARTITION = "partition"  # the training samples of each client
ALIGNMENT = "alignment"  # (part): the order of samples that clients have by their ids
VALIDATION = "validation"  # (client): the samples that a client holds out
BATCHES = "batches"  # (round, client, local epoch): the order of a client's samples
CLIENT_ORDER = "client order"  # (round): the clients that take part, and their order
AUGMENTATION = "augmentation"  # (round, client, step, change): a draw for each sample
BLOCK = "block"  # (round, client, step, block): dropout masks and the like
OFFLINE = "offline"  # (epoch): the order of recorded steps in offline training of a back


def derive(seed: int, purpose: str, *indices: int) -> int:
    """Return the seed of one draw: 63 bits of the SHA-256 of its identity."""
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a fresh CPU generator for one draw."""
    return torch.Generator().manual_seed(derive(seed, purpose, *indices))
