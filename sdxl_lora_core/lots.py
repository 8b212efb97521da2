"""Choices made by hashing: each depends on its arguments only, on every machine and with every library."""

from __future__ import annotations

import hashlib


def pick(count: int, *lot: object) -> int:
    """A number from 0 to count - 1 that `lot` decides; all are equally likely."""
    digest = hashlib.sha256("/".join(map(str, lot)).encode()).digest()
    return int.from_bytes(digest, "big") % count


def share(*lot: object) -> float:
    """A number from 0 to 1, 1 left out, that `lot` decides."""
    return pick(2**53, *lot) / 2**53
