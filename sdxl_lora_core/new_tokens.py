"""New tokens for CLIP: words whose embeddings are learned (textual inversion, Gal et al., arXiv 2208.01618).

An encoder's vocabulary stays as it is; the vectors of new tokens follow its last row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dataset.captions import holds_word
from .files import write_atomic
from .hashed_random import seed_of
from .lora_dialects import ENCODER_KEYS
from .prompts import CHUNK_TOKENS, TokenIds
from .safetensors_file import save_tensors
from .sdxl.loading import Part

if TYPE_CHECKING:
    from .dataset.caption_dataset import CaptionDataset
    from .train_config import TrainConfig

Vectors = Mapping[Part, Tensor]  # what a token stands for: [n, 768] for the first encoder, [n, 1280] for the second
_NAME = re.compile(r"\w[\w-]*", re.ASCII)


def read_new_tokens(text: str, vectors_per_token: int) -> dict[str, str]:
    """`"ohwx=cat, zwx"` as the word that each new token starts from, empty for a random start.

    Raises ValueError for a name that is none, for one given twice and for more vectors than a prompt holds.
    """
    tokens: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, start = (part.strip() for part in entry.partition("="))
        if not _NAME.fullmatch(name):
            raise ValueError(f"new_tokens names {name!r}: take letters, digits, - and _ as in 'ohwx' or 'ohwx=cat'")
        if name.lower() in map(str.lower, tokens):
            raise ValueError(f"new_tokens names {name} twice: each token is learned once")
        tokens[name] = start
    if len(tokens) * vectors_per_token > CHUNK_TOKENS:
        raise ValueError(
            f"new_tokens has {len(tokens)} words and vectors_per_token is {vectors_per_token}: a prompt holds "
            f"{CHUNK_TOKENS} tokens, so lower vectors_per_token"
        )
    return tokens


def tokens_of(config: TrainConfig) -> dict[str, str]:
    """The new tokens of a run, and what each starts from."""
    return read_new_tokens(config.new_tokens, config.vectors_per_token)


def placeholder_ids(config: TrainConfig) -> TokenIds:
    """Ids beyond any vocabulary, to count with before the encoders are there."""
    return dict.fromkeys(tokens_of(config), [2**31 - 1] * config.vectors_per_token)


def all_trigger_words(dataset: CaptionDataset, config: TrainConfig) -> list[str]:
    """What calls for the LoRA in a prompt: the dataset's words and the new tokens."""
    return list(dict.fromkeys([*dataset.trigger_words, *tokens_of(config)]))


def require_shown(config: TrainConfig, captions: Sequence[str]) -> None:
    """Raises ValueError for a new token that none of the training captions holds."""
    for name in tokens_of(config):
        if not any(holds_word(caption, name) for caption in captions):
            raise ValueError(
                f"new_tokens names {name} and no caption holds it: give {name} as the dataset's trigger_word, or write "
                "it into the captions"
            )


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


def start_vectors(
    encoder: Any, tokenizer: Any, tokens: Mapping[str, str], count: int, seed: int
) -> dict[str, Tensor]:  # fmt: skip
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


def write_embedding(path: Path, vectors: Vectors) -> None:
    """One token alone, as ComfyUI and A1111 read it from their folder `embeddings`: float32 clip_l and clip_g."""
    tensors = {ENCODER_KEYS[part]: tensor.float() for part, tensor in vectors.items()}
    write_atomic(path, lambda file: save_tensors(file, tensors))
