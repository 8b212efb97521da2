"""The folders of the cache: everything in them can be computed again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CacheFolders:
    """One folder for each kind of cached result, all below `root`. They are created when something is stored.

    The version in a folder's name is raised when the format of its files changes.
    """

    root: Path

    @property
    def images(self) -> Path:
        """Generated images with their manifests (see image_cache)."""
        return self.root / "images"

    @property
    def hashes(self) -> Path:
        """SHA-256 hashes of large files, by path, size and modification time (see files.file_sha256)."""
        return self.root / "hashes"

    @property
    def latents(self) -> Path:
        """VAE posteriors of training images."""
        return self.root / "latents" / "v1"

    @property
    def prompts(self) -> Path:
        """Prompt embeddings, shared by training and generation."""
        return self.root / "prompts" / "v1"

    @property
    def memory_plans(self) -> Path:
        """Bytes that a training step takes, by model and shapes."""
        return self.root / "memory" / "v3"
