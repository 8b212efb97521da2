"""The text encoders that are trained. They run in every step; the embeddings of the others are cached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.modules import LoRAFile
from ...sdxl.base import SDXLBase, load_part, load_tokenizers
from ...sdxl.family import ENCODERS, Part
from ...text.encoding import TokenIds, encode_text, stack_embeds
from ...text.new_tokens import TokenEmbedding, add_tokens, start_vectors
from ..config.adapter import encoder_rate
from ..config.captions import tokens_of
from ..config.train_config import TrainConfig, learning_encoders
from ..job import TrainingJob
from .adapters import Adapter
from .flat_parameters import ParameterGroup

log = logging.getLogger("sdxl_lora")

LoadPart = Callable[[SDXLBase, Part, torch.dtype, torch.device], Any]

# CLIP's vocabulary is ordered by frequency: from this id on, words such as ohwx (47993) hardly occur.
_RARE = 40_000


class TrainedEncoders(nn.Module):
    """Text encoders with a LoRA, new tokens, or both. `start` is the file that training continues from."""

    def __init__(
        self, job: TrainingJob, start: LoRAFile | None, device: torch.device, load: LoadPart = load_part
    ) -> None:
        super().__init__()
        base, config, dtype = job.base, job.config, job.dtype(device)
        self.chunks = config.caption_chunks
        self.tokenizers: dict[Part, Any] = dict(zip(ENCODERS, load_tokenizers(base), strict=True))
        self.encoders: dict[Part, Any] = {}
        self.adapters: dict[Part, Adapter] = {}
        self.embeddings: dict[Part, TokenEmbedding] = {}
        self.token_ids: TokenIds = {}
        for part in learning_encoders(config):
            self.encoders[part] = load(base, part, dtype, device)
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
        for name in tokens_of(config):
            if len(ids := tokenizer(name, add_special_tokens=False).input_ids) == 1 and ids[0] < _RARE:
                log.warning(
                    "new_tokens names %s, which is a word that %s knows: the new token replaces it in captions and "
                    "prompts; a made-up word such as ohwx avoids that",
                    name,
                    part,
                )
        vectors = start_vectors(encoder, tokenizer, tokens_of(config), config.vectors_per_token, config.seed)
        if start:
            vectors |= {name: known[part] for name, known in start.tokens.items()}
        self.embeddings[part], self.token_ids = add_tokens(encoder, tokenizer, vectors)

    def forward(
        self, captions: Sequence[str], embeds: Tensor | None, pooled: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The embeddings [B, T, C] and pooled embeddings [B, P] of the captions.

        Those of trained encoders are computed; the others are taken from the arguments, None if all are trained.
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
        """The present vectors of each new token, copied to the CPU."""
        first = min((ids[0] for ids in self.token_ids.values()), default=0)
        return {
            name: {
                part: embedding.rows.detach()[ids[0] - first : ids[-1] + 1 - first].to("cpu", copy=True)
                for part, embedding in self.embeddings.items()
            }
            for name, ids in self.token_ids.items()
        }
