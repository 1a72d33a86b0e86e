"""Changes to bytes that are well-formed."""

import random


def mutate(data: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    """Return the bytes with one to four changes: flipped, replaced, cut, doubled, spliced."""
    changed = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(changed) + 1)
        length = min(draws.choice((1, 2, 4, 8, 64, 1024)), len(changed) - at)
        match draws.randrange(8):
            case 0 if length:
                changed[at] ^= 1 << draws.randrange(8)
            case 1 if length:
                changed[at] = draws.randrange(256)
            case 2:
                changed[at : at + length] = draws.randbytes(length)
            case 3:
                extreme = draws.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                order = draws.choice(("big", "little"))
                size = draws.choice((4, 8))
                number = (extreme % 2 ** (8 * size)).to_bytes(size, order)
                changed[at : at + size] = number
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                del changed[at:]
            case 7:
                other = draws.choice(others)
                start = draws.randrange(len(other))
                changed[at : at + length] = other[start : start + draws.choice((8, 64, 1024))]
    return bytes(changed)


def flip(data: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    """Return the bytes with one bit flipped, wherever it is."""
    changed = bytearray(data)
    changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
    return bytes(changed)
