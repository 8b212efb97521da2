"""Parses the prompts of a request, and states what their embeddings depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..sdxl.family import SDXL, Family
from ..text.embedding_files import EmbeddingFile, open_embedding
from ..text.prompt_syntax import Piece, Reading, read_comfy
from .config import GenerateConfig

# Raised when a prompt syntax is parsed differently, so that images generated before are not found.
PARSER_VERSIONS = {"plain": 1, "comfy": 1}


def reading_facts(config: GenerateConfig) -> dict[str, Any]:
    """The settings that embeddings depend on; empty if prompts are plain and truncated at 77 tokens."""
    if config.prompt_syntax != "plain":
        return {"prompt_syntax": [config.prompt_syntax, PARSER_VERSIONS[config.prompt_syntax]]}
    return {"long_prompts": config.long_prompts} if config.long_prompts != "cut" else {}


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt with what its syntax means."""

    text: str
    reading: Reading

    @cached_property
    def embeddings(self) -> tuple[EmbeddingFile, ...]:
        """Every embedding file that the prompt names, in order."""
        contents = [piece.content for piece in self.reading.pieces]
        return tuple(content for content in contents if isinstance(content, EmbeddingFile))

    @cached_property
    def words(self) -> str:
        """The prompt in one line without syntax and embeddings, as a caption; unchanged if nothing else is left."""
        texts = [piece.content for piece in self.reading.pieces if isinstance(piece.content, str)]
        words = " ".join(" ".join(texts).split()) or " ".join(self.text.split())
        return words.replace(" ,", ",")


@dataclass(frozen=True)
class PromptReader:
    """Parses each prompt once. `find` returns the file of `embedding:name`, None if there is none."""

    config: GenerateConfig
    find: Callable[[str], Path | None] = lambda name: None
    hash_memo: Path | None = None
    family: Family = SDXL
    _parsed: dict[str, ParsedPrompt] = field(default_factory=dict)
    _opened: dict[str, EmbeddingFile | None] = field(default_factory=dict)

    def parse(self, prompt: str) -> ParsedPrompt:
        """Raises ValueError or FileNotFoundError as read_comfy and open_embedding do."""
        if prompt not in self._parsed:
            self._parsed[prompt] = ParsedPrompt(prompt, self._read(prompt))
        return self._parsed[prompt]

    def facts(self, prompt: str) -> dict[str, Any]:
        """Everything that a prompt's embeddings depend on except its text; empty if it is plain and truncated."""
        used = [file.sha256 for file in self.parse(prompt).embeddings]
        return {**reading_facts(self.config), **({"embeddings": used} if used else {})}

    def _read(self, prompt: str) -> Reading:
        if self.config.prompt_syntax == "comfy":
            return Reading(read_comfy(prompt, self._open), chunks=None, one_tokenizer=True)
        chunks = 1 if self.config.long_prompts == "cut" else None
        return Reading([Piece(prompt)], chunks, one_tokenizer=False)

    def _open(self, name: str) -> EmbeddingFile | None:
        if name not in self._opened:
            path = self.find(name) if name else None
            self._opened[name] = open_embedding(name, path, self.hash_memo, self.family) if path else None
        return self._opened[name]
