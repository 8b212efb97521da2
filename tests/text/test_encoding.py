from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers
from sdxl_lora_core.text.encoding import encode_prompt_sdxl, truncated_words

LONG = " ".join(f"word{number}" for number in range(90))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["a red heart", "", LONG, "naïve café, \u732b!"])
def test_embeddings_equal_the_librarys_own(micro_base: SDXLBase, prompt: str) -> None:
    tokenizers = load_tokenizers(micro_base)
    encoders = [
        load_part(micro_base, "text_encoder", torch.float32),
        load_part(micro_base, "text_encoder_2", torch.float32),
    ]
    with torch.no_grad():
        embeds, pooled = encode_prompt_sdxl([prompt, "another"], tokenizers, encoders)
        pipeline = StableDiffusionXLPipeline.from_pretrained(micro_base.path, local_files_only=True)
        wanted, _, wanted_pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    assert embeds.shape == (2, 77, 8 + 12) and pooled.shape == (2, 16)
    torch.testing.assert_close(embeds[:1], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[:1], wanted_pooled, atol=1e-5, rtol=0)


def test_the_words_beyond_77_tokens_are_named(micro_base: SDXLBase) -> None:
    tokenizer, _ = load_tokenizers(micro_base)
    assert truncated_words("a red heart", tokenizer) == ""
    kept = tokenizer(LONG, truncation=True, max_length=77).input_ids
    rest = truncated_words(LONG, tokenizer)
    assert len(tokenizer(rest, add_special_tokens=False).input_ids) + len(kept) - 2 == len(
        tokenizer(LONG, add_special_tokens=False).input_ids
    )
