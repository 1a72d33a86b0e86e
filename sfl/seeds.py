"""Random draws that depend on what they are for, never on what ran before.

Every draw comes from (seed, purpose, round, client, step, ...). So any step can be computed again,
anywhere, at any time, with the same result; nothing random needs saving.
"""

import hashlib

import torch

# The purposes in use; a new one gets its line, so that no two draws share a stream by accident.
INITIAL_WEIGHTS = "initial weights"
PARTITION = "partition"  # which training samples are which client's
VALIDATION = "validation"  # (client): which of its samples a client holds out
BATCHES = "batches"  # (round, client, local epoch): the order of a client's samples
CLIENT_ORDER = "client order"  # (round): who takes part, and in which order
AUGMENTATION = "augmentation"  # (round, client, step, change): a draw for each sample
BLOCK = "block"  # (round, client, step, block): dropout masks and the like
OFFLINE = "offline"  # (epoch): the order of recorded steps when a back is trained offline


def derive(seed: int, purpose: str, *indices: int) -> int:
    """Return a seed for one draw: 63 bits of the SHA-256 of all that identifies it."""
    text = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a fresh CPU generator for one draw."""
    return torch.Generator().manual_seed(derive(seed, purpose, *indices))
