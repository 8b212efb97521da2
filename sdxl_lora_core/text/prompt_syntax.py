r"""Parses ComfyUI's prompt syntax, and splits prompts into CLIP's chunks.

| syntax           | meaning                                                                        |
|------------------|--------------------------------------------------------------------------------|
| (word:1.2)       | weight 1.2, regardless of outer parentheses                                    |
| (word)           | 1.1 times the weight of the surrounding text                                   |
| \( and \)        | literal parentheses                                                            |
| embedding:name   | the vectors of a file; at the start of the prompt or after a space or newline  |

Unmatched parentheses are text, as in ComfyUI and unlike in A1111.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .encoding import CHUNK_TOKENS

if TYPE_CHECKING:
    from .embedding_files import EmbeddingFile

FindEmbedding = Callable[[str], "EmbeddingFile | None"]
Token = tuple[int, float]  # id and weight

NESTED = 1.1  # the factor of parentheses without a number
WORD_TOKENS = 8  # a piece of at least this many tokens may be split between chunks, a shorter one stays in one chunk
DEEPEST = 70  # parentheses in each other
LARGEST_WEIGHT = 1000.0  # above it embeddings are so large that the UNet's values are not finite
_PARENTHESIS = re.compile(r"\\[()]|([()])")
_ESCAPED = re.compile(r"\\([()])")
_EMBEDDING = "embedding:"
_BEFORE_EMBEDDING = re.compile(rf"[ \n](?={_EMBEDDING})")


class Piece(NamedTuple):
    """Text that is tokenized in one call, or an embedding in its place; all of its tokens have one weight."""

    content: str | EmbeddingFile
    weight: float = 1.0


class Reading(NamedTuple):
    """A parsed prompt: its pieces, and the number of chunks of 75 tokens to encode (None: all).

    `one_tokenizer`: the first encoder's tokenizer is used for both encoders. Otherwise each uses its own, as in
    diffusers, where "!" in the text becomes padding for the second: its padding token is "!", and transformers
    recognises special tokens within text.
    """

    pieces: list[Piece]
    chunks: int | None
    one_tokenizer: bool


def read_comfy(prompt: str, find: FindEmbedding) -> list[Piece]:
    """The pieces of a prompt in ComfyUI's syntax. `find` opens an embedding by name, and returns None if there is none.

    Raises ValueError for a weight that is not finite and for `embedding:` without a name, FileNotFoundError for an
    embedding that does not exist.
    """
    return [
        piece
        for text, weight in _weighted(prompt, 1.0)
        for words in _BEFORE_EMBEDDING.split(_ESCAPED.sub(r"\1", text))
        for piece in _pieces(words, weight, find)
    ]


def chunked(groups: Sequence[Sequence[Token]]) -> list[list[Token]]:
    """The tokens of all pieces in rows of at most 75. A short piece that does not fit in a row starts the next one."""
    rows: list[list[Token]] = [[]]
    for group in groups:
        if len(group) < WORD_TOKENS and len(rows[-1]) + len(group) > CHUNK_TOKENS:
            rows.append([])
        for token in group:
            if len(rows[-1]) == CHUNK_TOKENS:
                rows.append([])
            rows[-1].append(token)
    return rows


def _weighted(text: str, around: float, depth: int = 0) -> Iterator[tuple[str, float]]:
    """Text, with its escapes, and its weight; `around` is the weight of the surrounding text."""
    for part in _outermost(text):
        if part[0] == "(" and part[-1] == ")" and not part.endswith("\\)"):
            if depth == DEEPEST:
                raise ValueError(f"the prompt has more than {DEEPEST} parentheses in each other: remove some")
            yield from _weighted(*_own_weight(part[1:-1], around * NESTED), depth + 1)
        else:
            yield part, around


def _outermost(text: str) -> Iterator[str]:
    """The text split before and after each outermost pair of parentheses."""
    depth = start = 0
    for found in _PARENTHESIS.finditer(text):
        if found[1] == "(":
            if depth == 0 and found.start() > start:
                yield text[start : found.start()]
                start = found.start()
            depth += 1
        elif found[1] == ")":
            depth -= 1
            if depth == 0:
                yield text[start : found.end()]
                start = found.end()
    if start < len(text):
        yield text[start:]


def _own_weight(text: str, otherwise: float) -> tuple[str, float]:
    """The text in parentheses without the weight at its end, and that weight."""
    words, _, number = text.rpartition(":")
    try:
        weight = float(number) if words else otherwise
    except ValueError:
        return text, otherwise
    if not abs(weight) <= LARGEST_WEIGHT:
        raise ValueError(
            f"the prompt gives ({text[:80]}) the weight {weight}: write a number up to {LARGEST_WEIGHT:g}, such as "
            f"({words[:80]}:1.2)"
        )
    return words or text, weight


def _pieces(words: str, weight: float, find: FindEmbedding) -> Iterator[Piece]:
    if not words.startswith(_EMBEDDING):
        if words:
            yield Piece(words, weight)
        return
    name, *rest = words.removeprefix(_EMBEDDING).split() or [""]
    embedding, comma = find(name), ""
    if embedding is None and name.endswith(","):  # a file's own name may end in a comma
        embedding, comma = find(name.rstrip(",")), name[len(name.rstrip(",")) :] + " "
    if embedding is None:
        raise _missing(name.rstrip(","))
    yield Piece(embedding, weight)
    if after := comma + " ".join(rest):
        yield Piece(after, weight)


def _missing(name: str) -> Exception:
    if not name:
        return ValueError("the prompt has embedding: without a name: write embedding:name, without a space")
    return FileNotFoundError(
        f"the prompt names embedding:{name}, and no embeddings folder has it: put {name}.safetensors into one, "
        "or remove it from the prompt"
    )
