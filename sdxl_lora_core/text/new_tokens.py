"""New tokens for CLIP: words with trained embeddings (textual inversion, Gal et al., arXiv 2208.01618).

The vocabulary of an encoder is unchanged; the vectors of new tokens follow its last row.
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
    """CLIP's token embedding, extended by trainable float32 `rows` [n, C]."""

    def __init__(self, known: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.known = known
        self.rows = nn.Parameter(rows.float().to(known.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        new = ids - self.known.num_embeddings
        known = self.known(ids.clamp_max(self.known.num_embeddings - 1))
        rows = nn.functional.embedding(
            new.clamp_min(0), self.rows
        )  # plain indexing would sum gradients in varying order
        return torch.where(new[..., None] >= 0, rows.to(known.dtype), known)


def add_tokens(encoder: Any, tokenizer: Any, vectors: Mapping[str, Tensor]) -> tuple[TokenEmbedding, TokenIds]:
    """Adds the vectors [n, C] of each new token to a text encoder. Returns the embedding and the ids of each token."""
    known = encoder.get_input_embeddings()
    embedding = TokenEmbedding(known, torch.cat(list(vectors.values())))
    encoder.set_input_embeddings(embedding)
    # Published SDXL has 2 here, with which transformers pools at the highest id: that of a new token would be higher.
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id
    ends = list(accumulate(map(len, vectors.values()), initial=known.num_embeddings))
    return embedding, {name: range(*ids) for name, ids in zip(vectors, pairwise(ends), strict=True)}


@contextmanager
def added_tokens(encoder: Any, tokenizer: Any, vectors: Mapping[str, Tensor]) -> Iterator[TokenIds]:
    """Adds tokens for the duration of the block."""
    known = encoder.get_input_embeddings()
    try:
        yield add_tokens(encoder, tokenizer, vectors)[1] if vectors else {}
    finally:
        encoder.set_input_embeddings(known)


def start_vectors(encoder: Any, tokenizer: Any, tokens: Mapping[str, str], count: int, seed: int) -> dict[str, Tensor]:
    """The initial values of the `count` vectors of each token, float32 [count, C].

    These are the embeddings of its word's tokens: repeated if there are fewer than `count`, averaged in groups if there
    are more. Without a word they are random with the standard deviation of the vocabulary.
    """
    known = encoder.get_input_embeddings().weight.detach().float().cpu()
    starts = {}
    for name, word in tokens.items():
        if word:
            ids = tokenizer(word, add_special_tokens=False).input_ids
            starts[name] = torch.stack([known[ids[i % len(ids) :: count]].mean(dim=0) for i in range(count)])
        else:
            generator = torch.Generator().manual_seed(seed_of(seed, "token", name))
            starts[name] = known.std() * torch.randn(count, known.shape[1], generator=generator)
    return starts
