"""Choices made by hashing: each depends on its arguments only, on every machine and with every library."""

from __future__ import annotations

import hashlib

import torch


def digest(*lot: object) -> bytes:
    """32 bytes that `lot` decides."""
    return hashlib.sha256("/".join(map(str, lot)).encode()).digest()


def seed_of(*lot: object) -> int:
    """A seed for torch's generators that `lot` decides."""
    return int.from_bytes(digest(*lot)[:7], "little")


def pick(count: int, *lot: object) -> int:
    """A number from 0 to count - 1 that `lot` decides; all are equally likely."""
    return int.from_bytes(digest(*lot), "big") % count


def share(*lot: object) -> float:
    """A number from 0 to 1, 1 left out, that `lot` decides."""
    return pick(2**53, *lot) / 2**53


def generator(seed: int, step: int, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, step, position)[:8], "little", signed=True))
