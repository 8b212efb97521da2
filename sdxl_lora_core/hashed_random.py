"""Random numbers by hashing: each depends on its arguments only, on every machine and with every library version."""

from __future__ import annotations

import hashlib

import torch


def digest(*key: object) -> bytes:
    """SHA-256 of the arguments."""
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def seed_of(*key: object) -> int:
    """A seed for torch's generators."""
    return int.from_bytes(digest(*key)[:7], "little")


def random_index(count: int, *key: object) -> int:
    """A uniform integer from 0 to count - 1."""
    return int.from_bytes(digest(*key), "big") % count


def uniform(*key: object) -> float:
    """A uniform number in [0, 1)."""
    return random_index(2**53, *key) / 2**53


def generator(seed: int, step: int, position: int) -> torch.Generator:
    """A CPU generator seeded by the arguments."""
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, step, position)[:8], "little", signed=True))
