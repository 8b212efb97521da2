"""How the prompts of one request are read, and what of that their embeddings depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..text.embedding_files import EmbeddingFile, open_embedding
from ..text.prompt_syntax import Piece, Reading, read_comfy
from .config import GenerateConfig

# Raised when a prompt syntax is read in another way, so that images made the old way are not found.
PARSER_VERSIONS = {"plain": 1, "comfy": 1}


def reading_facts(config: GenerateConfig) -> dict[str, Any]:
    """What embeddings depend on besides prompts and files; nothing where prompts are plain and cut at 77 tokens."""
    if config.prompt_syntax != "plain":
        return {"prompt_syntax": [config.prompt_syntax, PARSER_VERSIONS[config.prompt_syntax]]}
    return {"long_prompts": config.long_prompts} if config.long_prompts != "cut" else {}


@dataclass(frozen=True)
class PromptReader:
    """`find` gives the file that `embedding:name` means, None if there is none."""

    config: GenerateConfig
    find: Callable[[str], Path | None] = lambda name: None
    hash_memo: Path | None = None
    _opened: dict[str, EmbeddingFile | None] = field(default_factory=dict)

    def read(self, prompt: str) -> Reading:
        """Raises ValueError or FileNotFoundError for what read_comfy and open_embedding refuse."""
        if self.config.prompt_syntax == "comfy":
            return Reading(read_comfy(prompt, self._open), chunks=None, one_tokenizer=True)
        chunks = 1 if self.config.long_prompts == "cut" else None
        return Reading([Piece(prompt)], chunks, one_tokenizer=False)

    def embeddings(self, prompt: str) -> tuple[EmbeddingFile, ...]:
        """Every embedding file that the prompt names, in its order."""
        contents = [piece.content for piece in self.read(prompt).pieces]
        return tuple(content for content in contents if isinstance(content, EmbeddingFile))

    def words(self, prompt: str) -> str:
        """The prompt in one line without syntax and embeddings, as a caption. If nothing is left, as it stands."""
        texts = [piece.content for piece in self.read(prompt).pieces if isinstance(piece.content, str)]
        words = " ".join(" ".join(texts).split()) or " ".join(prompt.split())
        return words.replace(" ,", ",")

    def facts(self, prompt: str) -> dict[str, Any]:
        """What a prompt's embeddings depend on besides its text; nothing where it is plain and cut."""
        used = [file.sha256 for file in self.embeddings(prompt)]
        return {**reading_facts(self.config), **({"embeddings": used} if used else {})}

    def _open(self, name: str) -> EmbeddingFile | None:
        if name not in self._opened:
            path = self.find(name) if name else None
            self._opened[name] = open_embedding(name, path, self.hash_memo) if path else None
        return self._opened[name]
