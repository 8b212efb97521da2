"""Textual inversion: words that both text encoders learn, alone or with a LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.metadata import trigger_words
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers
from sdxl_lora_core.text.encoding import encode_prompt_sdxl, token_ids, truncated_words
from sdxl_lora_core.text.new_tokens import TokenEmbedding, add_tokens
from sdxl_lora_core.training.config.captions import read_new_tokens
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.caption_variants import caption_variants
from sdxl_lora_core.training.job import TrainingJob
from tests.micro.images import draw as images_of
from tests.micro.runs import CPU, SMALL, Cancelled, Train, Trained, cancel_at, load, lora_bytes, trainable, weights

ALONE: dict[str, Any] = {
    "lora_name": "small",
    "steps": 4,
    "batch_size": 2,
    "train_unet": False,
    "new_tokens": "zwx=red",
    "token_learning_rate": 0.1,
}
PIVOTAL = replace(SMALL, new_tokens="zwx=red, qq-2", vectors_per_token=2)


WORDS = {"trigger_word": "zwx qq-2"}


@pytest.fixture
def named(pictures: Path) -> CaptionDataset:
    """The pictures with both words in their captions."""
    return load(pictures, **WORDS)


def encoders_of(base: SDXLBase) -> list[Any]:
    return [load_part(base, "text_encoder", torch.float32), load_part(base, "text_encoder_2", torch.float32)]


@torch.no_grad()
def encode(base: SDXLBase, prompt: str, vectors: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokenizers, encoders, ids = load_tokenizers(base), encoders_of(base), {}
    for number, (tokenizer, encoder) in enumerate(zip(tokenizers, encoders, strict=True)):
        if vectors:
            _, ids = add_tokens(encoder, tokenizer, {name: both[number] for name, both in vectors.items()})
    return encode_prompt_sdxl([prompt], tokenizers, encoders, 1, ids)


def known(base: SDXLBase, word: str) -> tuple[Tensor, Tensor]:
    (number,) = load_tokenizers(base)[0](word, add_special_tokens=False).input_ids
    first, second = (encoder.get_input_embeddings().weight[[number]].clone() for encoder in encoders_of(base))
    return first, second


def test_names_and_starts_are_read_and_mistakes_refused() -> None:
    assert read_new_tokens("zwx = orange cat, qq-2", 2) == {"zwx": "orange cat", "qq-2": ""}
    assert read_new_tokens("", 1) == {}
    for text, message in (
        ("a b", "names 'a b'"),
        ("<cat>", "names '<cat>'"),
        ("=cat", "names ''"),
        ("zwx, ZWX=cat", "names ZWX twice"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(new_tokens=text)
    with pytest.raises(ValueError, match="2 words and vectors_per_token is 40"):
        TrainConfig(new_tokens="a, b", vectors_per_token=40)


def test_a_new_token_is_found_as_a_whole_word(micro_base: SDXLBase) -> None:
    tokenizer, _ = load_tokenizers(micro_base)
    new = {"zwx": range(49408, 49410), "zwx-cat": range(49410, 49411)}

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert token_ids("a ZWX, zwx-cat.", tokenizer, new) == [
        *plain("a"),
        49408,
        49409,
        *plain(","),
        49410,
        *plain("."),
    ]
    for other in ("a zwxy", "azwx", "zwx_1", ""):
        assert token_ids(other, tokenizer, new) == plain(other)
    assert truncated_words("zwx " * 38 + "heart", tokenizer, 1, new) == "heart"
    assert truncated_words("zwx " * 37 + "heart", tokenizer, 1, new) == ""


def test_a_token_with_a_words_vector_reads_as_the_word(micro_base: SDXLBase) -> None:
    """Pooled too: transformers would pool at the highest id, which is the new token's."""
    embeds, pooled = encode(micro_base, "a zwx heart", {"zwx": known(micro_base, "red")})
    wanted, wanted_pooled = encode(micro_base, "a red heart", {})
    assert torch.equal(embeds, wanted) and torch.equal(pooled, wanted_pooled)


@pytest.mark.slow
def test_other_words_stay_as_they_are(micro_base: SDXLBase) -> None:
    vectors = (torch.randn(2, 8), torch.randn(2, 12))
    for prompt in ("a red heart", ""):
        for ours, plain in zip(
            encode(micro_base, prompt, {"zwx": vectors}), encode(micro_base, prompt, {}), strict=True
        ):
            assert torch.equal(ours, plain)


def test_several_vectors_follow_one_another(micro_base: SDXLBase) -> None:
    both = tuple(torch.cat(pair) for pair in zip(known(micro_base, "red"), known(micro_base, "heart"), strict=True))
    embeds, pooled = encode(micro_base, "a zwx!", {"zwx": both})  # type: ignore[dict-item]
    wanted, wanted_pooled = encode(micro_base, "a red heart!", {})
    assert torch.equal(embeds, wanted) and torch.equal(pooled, wanted_pooled)


@pytest.mark.slow
def test_start_words_and_random_starts(micro_base: SDXLBase) -> None:
    tokens = trainable(micro_base, PIVOTAL).learned().tokens
    for part, row in zip(("text_encoder", "text_encoder_2"), known(micro_base, "red"), strict=True):
        assert torch.equal(tokens["zwx"][part], row.repeat(2, 1))
        vocabulary = load_part(micro_base, part, torch.float32).get_input_embeddings().weight  # type: ignore[operator]
        assert 0.3 < tokens["qq-2"][part].std() / vocabulary.std() < 3
    other = trainable(micro_base, replace(PIVOTAL, seed=1)).learned().tokens
    assert not torch.equal(other["qq-2"]["text_encoder"], tokens["qq-2"]["text_encoder"])
    assert torch.equal(other["zwx"]["text_encoder"], tokens["zwx"]["text_encoder"])


def test_tokens_learn_alone(trained: Trained, micro_base: SDXLBase) -> None:
    result = trained(TrainConfig(**ALONE), **WORDS)
    assert set(load_file(result.lora_path)) == {"bundle_emb.zwx.clip_l", "bundle_emb.zwx.clip_g"}
    assert result.state_dict == {} and result.report.modules == 0 and result.report.rank == []
    file = read_lora(result.lora_path)
    for part, start in zip(("text_encoder", "text_encoder_2"), known(micro_base, "red"), strict=True):
        assert 0.05 < (file.tokens["zwx"][part] - start).abs().max() < 1  # type: ignore[index]
    assert "zwx" in trigger_words(file.metadata)
    assert "new token zwx: 1 vectors" in describe_lora(result.lora_path)
    slower = trained(TrainConfig(**{**ALONE, "token_learning_rate": 0.01}), **WORDS)
    assert weights(slower) != weights(result)


def test_tokens_learn_with_a_lora(trained: Trained) -> None:
    file = read_lora(trained(PIVOTAL, **WORDS).lora_path)
    assert set(file.tokens) == {"zwx", "qq-2"} and len(file.tokens["zwx"]["text_encoder_2"]) == 2
    assert file.unet and not file.text_encoder and not file.unknown
    assert any(module.up.abs().max() > 0 for module in file.unet.values() if isinstance(module, LoRAModule))


def test_a_run_with_tokens_resumes_exactly(run: Train, named: CaptionDataset) -> None:
    config = replace(PIVOTAL, text_encoder_2_learning_rate=1e-3, ema_decay=0.9, keep_best="off", steps=5)
    whole = run(config, dataset=named)
    with pytest.raises(Cancelled):
        run(config, where="b", dataset=named, on_step=cancel_at(3))
    assert lora_bytes(run(config, where="b", dataset=named)) == lora_bytes(whole)


def test_a_token_can_be_trained_further(
    run: Train, trained: Trained, micro_base: SDXLBase, named: CaptionDataset
) -> None:
    first = trained(TrainConfig(**ALONE), **WORDS)
    start = TrainConfig(**ALONE, continue_from=str(first.lora_path))
    tokens = read_lora(first.lora_path).tokens["zwx"]
    begun = trainable(micro_base, start).learned().tokens["zwx"]
    assert all(torch.equal(begun[part], rows) for part, rows in tokens.items())
    with pytest.raises(ValueError, match="with the new tokens zwx with 1 vectors, and this run has zwx with 2 vectors"):
        run(replace(start, vectors_per_token=2), where="b", dataset=named)


def test_a_token_that_no_caption_holds_is_refused(run: Train) -> None:
    with pytest.raises(ValueError, match="new_tokens names zwx and no caption contains it: set zwx as the dataset's"):
        run(TrainConfig(**ALONE))


def test_the_embedding_file_loads_in_diffusers(trained: Trained, micro_base: SDXLBase) -> None:
    result = trained(PIVOTAL, **WORDS)
    path = result.lora_path.parent.parent / "embeddings" / "small-zwx.safetensors"
    assert "embedding:small-zwx " in result.report.new_tokens["zwx"]
    vectors = load_file(path)
    assert vectors["clip_l"].shape == (2, 8) and vectors["clip_g"].shape == (2, 12)
    pipeline = StableDiffusionXLPipeline.from_pretrained(micro_base.path, local_files_only=True)
    pipeline.load_textual_inversion(vectors["clip_l"], "zwx", pipeline.tokenizer, pipeline.text_encoder)
    pipeline.load_textual_inversion(vectors["clip_g"], "zwx", pipeline.tokenizer_2, pipeline.text_encoder_2)
    for module in pipeline.text_encoder_2.modules():  # as README says
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 49407
    with torch.no_grad():
        wanted, _, wanted_pooled, _ = pipeline.encode_prompt("a zwx heart", do_classifier_free_guidance=False)
    ours, pooled = encode(micro_base, "a zwx heart", {"zwx": (vectors["clip_l"], vectors["clip_g"])})
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, wanted_pooled, atol=1e-5, rtol=0)


def test_a_stack_brings_its_tokens_into_prompts(trained: Trained, micro_base: SDXLBase, tmp_path: Path) -> None:
    lora = trained(TrainConfig(**ALONE), **WORDS).lora_path
    parts = LoadedParts(CPU)

    def draw(prompt: str, strength_clip: float | None, prompts: Path | None = None) -> bytes:
        request = GenerateConfig(prompt=prompt, width=64, height=64, steps=2, cache="off")
        stack = [] if strength_clip is None else [LoRARef(lora, "x", 1.0, strength_clip)]
        images = images_of(micro_base, request, stack, parts=parts, prompt_cache=prompts)
        return images[0].pixels.tobytes()

    without = draw("a zwx", None, tmp_path)
    assert draw("a zwx", 1.0, tmp_path) != without == draw("a zwx", 0.0, tmp_path)
    assert draw("a zwx", 0.5) == draw("a zwx", 1.0) and draw("a heart", 1.0) == draw("a heart", None)


def test_a_token_without_vectors_for_one_encoder_is_damage(tmp_path: Path) -> None:
    file = LoRAFile(tokens={"zwx": {"text_encoder": torch.zeros(1, 8)}})
    write_lora(tmp_path / "x.safetensors", file, torch.float32)
    with pytest.raises(ValueError, match="new token zwx lacks vectors for one of the text encoders"):
        read_lora(tmp_path / "x.safetensors")


def test_the_gradient_of_a_token_is_the_same_every_time() -> None:
    """Where a token occurs again and again, threads must not add its gradients up in changing order."""
    embedding = TokenEmbedding(torch.nn.Embedding(10, 768), torch.zeros(2, 768))
    ids = torch.randint(12, (4, 77), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4, 77, 768, generator=torch.Generator().manual_seed(1))
    gradients = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(100):
            (gradient,) = torch.autograd.grad((embedding(ids) * weights).sum(), embedding.rows)
            gradients.add(gradient.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(gradients) == 1
    wanted = torch.stack([weights[ids == number].sum(dim=0) for number in (10, 11)])
    torch.testing.assert_close(gradient, wanted)


def test_settings_of_what_does_not_learn_are_refused() -> None:
    for name, value in (("rank", 4), ("adapter", "dora"), ("use_rslora", True), ("target_modules", "all-linear")):
        with pytest.raises(ValueError, match=f"{name} is {value} and only new_tokens are trained, without a LoRA"):
            TrainConfig(**{**ALONE, name: value})
    with pytest.raises(ValueError, match="'prodigy' and token_learning_rate is 0.01: .* so set it to 1"):
        TrainConfig(**{**ALONE, "token_learning_rate": 0.01}, optimizer="prodigy")
    assert TrainConfig(**{**ALONE, "token_learning_rate": 1.0}, optimizer="prodigy").leading_rate == 1


def test_the_rate_that_is_shown_is_one_that_learns(trained: Trained) -> None:
    result = trained(TrainConfig(**ALONE), **WORDS)
    rows = (result.loss_chart.parent / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("learning_rate")
    assert {float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]} == {0.1}
    assert read_lora(result.lora_path).metadata["ss_learning_rate"] == "0.1"


@pytest.mark.slow
def test_a_start_of_several_words_is_their_mean_where_there_are_fewer_vectors(micro_base: SDXLBase) -> None:
    for vectors, wanted in ((1, [["red", "heart"]]), (3, [["red"], ["heart"], ["red"]])):
        config = TrainConfig(new_tokens="zwx=red heart", vectors_per_token=vectors)
        rows = trainable(micro_base, config).learned().tokens["zwx"]["text_encoder"]
        means = [torch.cat([known(micro_base, word)[0] for word in words]).mean(dim=0) for words in wanted]
        torch.testing.assert_close(rows, torch.stack(means))


def test_nobodys_embedding_file_is_overwritten(run: Train, named: CaptionDataset, tmp_path: Path) -> None:
    foreign = tmp_path / "a" / "embeddings" / "small-zwx.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"somebody's")
    result = run(TrainConfig(**{**ALONE, "steps": 1}), dataset=named)
    assert result.lora_name == "small_00002.safetensors" and foreign.read_bytes() == b"somebody's"
    assert foreign.with_name("small_00002-zwx.safetensors").exists()


def test_captions_are_cut_with_their_new_tokens_counted(run: Train, named: CaptionDataset) -> None:
    config = TrainConfig(**{**ALONE, "vectors_per_token": 75, "steps": 1})
    cut = run(config, dataset=named).report.cut_captions
    assert len(cut) == len(named.entries) and all("picture number" in line for line in cut)


def test_tags_that_are_new_tokens_are_never_dropped(micro_base: SDXLBase, pictures: Path) -> None:
    config = replace(SMALL, tag_dropout=1.0, new_tokens="zwx")
    words = TrainingJob(micro_base, load(pictures), config).trigger_words
    assert caption_variants(("a, zwx, b",), "", words, config)[0] == "zwx"


def test_names_too_long_for_the_embeddings_file_are_refused_before_anything_is_loaded(
    run: Train, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_lora_core.sdxl import loading

    monkeypatch.setattr(loading, "from_folder", lambda *_: pytest.fail("a part was loaded"))
    token = "x" * 205
    with pytest.raises(ValueError, match=f"lora_name with new_tokens {token} is 's+-x+…, .* use at most 237"):
        run(replace(SMALL, lora_name="s" * 40, new_tokens=token), dataset=load(pictures, trigger_word=token))


def test_a_known_word_as_a_new_token_is_warned_of(micro_base: SDXLBase, caplog: pytest.LogCaptureFixture) -> None:
    trainable(micro_base, replace(SMALL, new_tokens="cat, ohwx"))
    assert caplog.text.count("new_tokens names cat, which is a word that text_encoder knows") == 1
    assert "new_tokens names ohwx" not in caplog.text
