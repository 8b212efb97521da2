"""Generated images on disk: each is made once, checked whenever it is read, and never the reason a generation fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cache.image_entries import SCHEMA
from .files import json_sha256


def key_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the settings as canonical JSON."""
    return json_sha256({"schema": SCHEMA, **settings})
