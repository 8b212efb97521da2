"""The text encoders that learn. They run in every step, where the others' embeddings come from the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.modules import LoRAFile
from ...sdxl.base import SDXLBase, load_part, load_tokenizers
from ...sdxl.loading import ENCODERS, Part
from ...text.encoding import TokenIds, encode_text, stack_embeds
from ...text.new_tokens import TokenEmbedding, add_tokens, start_vectors
from ..config.adapter import encoder_rate
from ..config.captions import tokens_of
from ..config.train_config import TrainConfig, learning_encoders
from .adapters import Adapter, ParameterGroup


class LearningEncoders(nn.Module):
    """Text encoders with a LoRA, with new tokens, or with both. `start` is the file that training continues from."""

    def __init__(
        self, base: SDXLBase, config: TrainConfig, start: LoRAFile | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.chunks = config.caption_chunks
        self.tokenizers: dict[Part, Any] = dict(zip(ENCODERS, load_tokenizers(base), strict=True))
        self.encoders: dict[Part, Any] = {}
        self.adapters: dict[Part, Adapter] = {}
        self.embeddings: dict[Part, TokenEmbedding] = {}
        self.token_ids: TokenIds = {}
        for part in learning_encoders(config):
            self.encoders[part] = load_part(base, part, dtype, device)
            self.add_module(part, self.encoders[part])
            if encoder_rate(config, part):
                self.adapters[part] = Adapter(self.encoders[part], config, part, start)
            if config.new_tokens:
                self._add_tokens(part, config, start)
        rows = [embedding.rows for embedding in self.embeddings.values()]
        rate = config.token_learning_rate / config.leading_rate
        self.token_groups = [ParameterGroup(rows, rate)] if rows else []

    def _add_tokens(self, part: Part, config: TrainConfig, start: LoRAFile | None) -> None:
        encoder, tokenizer = self.encoders[part], self.tokenizers[part]
        vectors = start_vectors(encoder, tokenizer, tokens_of(config), config.vectors_per_token, config.seed)
        if start:
            vectors |= {name: known[part] for name, known in start.tokens.items()}
        self.embeddings[part], self.token_ids = add_tokens(encoder, tokenizer, vectors)

    def forward(
        self, captions: Sequence[str], embeds: Tensor | None, pooled: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The captions' embeddings [B, T, C] and pooled ones [B, P]: those given, renewed where an encoder learns.

        None is given where all of them do.
        """
        hidden: dict[Part, Tensor] = {}
        for part, encoder in self.encoders.items():
            rows, vectors = encode_text(captions, self.tokenizers[part], encoder, self.chunks, self.token_ids)
            hidden[part] = stack_embeds(rows)
            pooled = pooled if vectors is None else vectors
        if embeds is not None and "text_encoder" not in hidden:
            hidden = {"text_encoder": embeds[..., : -hidden["text_encoder_2"].shape[-1]], **hidden}
        if embeds is not None and "text_encoder_2" not in hidden:
            hidden["text_encoder_2"] = embeds[..., hidden["text_encoder"].shape[-1] :]
        return torch.cat([hidden[part] for part in ENCODERS], dim=-1), pooled

    def tokens(self) -> dict[str, Mapping[Part, Tensor]]:
        """The vectors of each new token as they are now, copied to the CPU."""
        first = min((ids[0] for ids in self.token_ids.values()), default=0)
        return {
            name: {
                part: embedding.rows.detach()[ids[0] - first : ids[-1] + 1 - first].to("cpu", copy=True)
                for part, embedding in self.embeddings.items()
            }
            for name, ids in self.token_ids.items()
        }
