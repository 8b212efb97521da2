r"""ComfyUI's prompt syntax, and how a prompt is laid out in CLIP's chunks.

| written          | read as                                                                        |
|------------------|--------------------------------------------------------------------------------|
| (word:1.2)       | at 1.2, whatever the parentheses around it say                                 |
| (word)           | at 1.1 times the weight around it                                              |
| \( and \)        | parentheses of the prompt itself                                               |
| embedding:name   | the vectors of that file, at the prompt's start or after a space or a new line |

Parentheses without a partner are text. This is what ComfyUI does with them, not what A1111 does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .encoding import CHUNK_TOKENS

if TYPE_CHECKING:
    from .embedding_files import EmbeddingFile

FindEmbedding = Callable[[str], "EmbeddingFile | None"]
Token = tuple[int, float]  # id and weight

NESTED = 1.1  # what a pair of parentheses without a number multiplies by
WORD_TOKENS = 8  # so many tokens that belong together may be torn apart, fewer stay in one chunk
_PARENTHESIS = re.compile(r"\\[()]|([()])")
_ESCAPED = re.compile(r"\\([()])")
_EMBEDDING = "embedding:"
_BEFORE_EMBEDDING = re.compile(rf"[ \n](?={_EMBEDDING})")


class Piece(NamedTuple):
    """What is tokenised in one go, or an embedding that stands in its place; all of its tokens have one weight."""

    content: str | EmbeddingFile
    weight: float = 1.0


class Reading(NamedTuple):
    """A prompt taken apart: its pieces, and how many chunks of 75 tokens are read of it, all if None.

    `one_tokenizer`: the first encoder's tokenizer reads the text for both. Else the second one's reads "!" as padding,
    as it does in diffusers: that is what it pads with, and transformers finds special tokens in the text, too.
    """

    pieces: list[Piece]
    chunks: int | None
    one_tokenizer: bool


def read_comfy(prompt: str, find: FindEmbedding) -> list[Piece]:
    """The pieces of a prompt in ComfyUI's syntax. `find` opens an embedding by its name, None if there is none.

    Raises ValueError for a weight that is not finite and for `embedding:` without a name, FileNotFoundError for an
    embedding that is not there.
    """
    return [
        piece
        for text, weight in _weighted(prompt, 1.0)
        for words in _BEFORE_EMBEDDING.split(_ESCAPED.sub(r"\1", text))
        for piece in _pieces(words, weight, find)
    ]


def chunked(groups: Sequence[Sequence[Token]]) -> list[list[Token]]:
    """The tokens of all pieces in rows of at most 75. A short piece that does not fit any more starts the next row."""
    rows: list[list[Token]] = [[]]
    for group in groups:
        if len(group) < WORD_TOKENS and len(rows[-1]) + len(group) > CHUNK_TOKENS:
            rows.append([])
        for token in group:
            if len(rows[-1]) == CHUNK_TOKENS:
                rows.append([])
            rows[-1].append(token)
    return rows


def _weighted(text: str, around: float) -> Iterator[tuple[str, float]]:
    """Text, escapes still in it, with its weight. `around` is that of the parentheses it stands in."""
    for part in _outermost(text):
        if part[0] == "(" and part[-1] == ")" and not part.endswith("\\)"):
            yield from _weighted(*_own_weight(part[1:-1], around * NESTED))
        else:
            yield part, around


def _outermost(text: str) -> Iterator[str]:
    """The text cut before and after each pair of parentheses that stands in no other."""
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
    """What stands in parentheses, without the weight at its end."""
    words, _, number = text.rpartition(":")
    try:
        weight = float(number) if words else otherwise
    except ValueError:
        return text, otherwise
    if not math.isfinite(weight):
        raise ValueError(f"the prompt gives ({text}) the weight {weight}: write a number, such as ({words}:1.2)")
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
        "or take it out of the prompt"
    )
