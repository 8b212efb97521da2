"""New tokens for CLIP: words whose embeddings are learned (textual inversion, Gal et al., arXiv 2208.01618).

An encoder's vocabulary stays as it is; the vectors of new tokens follow its last row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..hashed_random import seed_of
from .encoding import TokenIds


class TokenEmbedding(nn.Module):
    """CLIP's token embedding with float32 `rows` [n, C] after its last one. Only they learn."""

    def __init__(self, known: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.known = known
        self.rows = nn.Parameter(rows.float().to(known.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        new = ids - self.known.num_embeddings
        known = self.known(ids.clamp_max(self.known.num_embeddings - 1))
        rows = nn.functional.embedding(new.clamp_min(0), self.rows)  # indexing adds gradients up in changing order
        return torch.where(new[..., None] >= 0, rows.to(known.dtype), known)


def add_tokens(encoder: Any, tokenizer: Any, vectors: Mapping[str, Tensor]) -> tuple[TokenEmbedding, TokenIds]:
    """Gives a text encoder the vectors [n, C] of each new token. Returns where they lie, and the ids they got."""
    known = encoder.get_input_embeddings()
    embedding = TokenEmbedding(known, torch.cat(list(vectors.values())))
    encoder.set_input_embeddings(embedding)
    # Published SDXL says 2 here, which transformers reads as: pool at the highest id. A new token's is higher still.
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id
    ends = list(accumulate(map(len, vectors.values()), initial=known.num_embeddings))
    return embedding, {name: range(*ids) for name, ids in zip(vectors, pairwise(ends), strict=True)}


@contextmanager
def added_tokens(encoder: Any, tokenizer: Any, vectors: Mapping[str, Tensor]) -> Iterator[TokenIds]:
    """add_tokens for the length of the block."""
    known = encoder.get_input_embeddings()
    try:
        yield add_tokens(encoder, tokenizer, vectors)[1] if vectors else {}
    finally:
        encoder.set_input_embeddings(known)


def start_vectors(encoder: Any, tokenizer: Any, tokens: Mapping[str, str], count: int, seed: int) -> dict[str, Tensor]:
    """Where the `count` vectors of each token start, float32 [count, C].

    That is at the tokens of its word, again and again if they are fewer, at the means of some if they are more; without
    a word it is at random, with the spread of the vocabulary.
    """
    known = encoder.get_input_embeddings().weight.detach().float().cpu()
    starts = {}
    for name, word in tokens.items():
        if word:
            ids = tokenizer(word, add_special_tokens=False).input_ids
            starts[name] = torch.stack([known[ids[i % len(ids) :: count]].mean(dim=0) for i in range(count)])
        else:
            draw = torch.Generator().manual_seed(seed_of(seed, "token", name))
            starts[name] = known.std() * torch.randn(count, known.shape[1], generator=draw)
    return starts
