"""LoRA on the text encoders: what they say in a step, what the file holds, and what of it is cached."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers
from sdxl_lora_core.text.encoding import encode_prompt_sdxl
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import Batch, PassOfUpdate
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from tests.micro.images import draw
from tests.micro.runs import CPU, WHOLE, Cancelled, Train, Trained, cancel_at, data_of, load, lora_bytes, trainable

FIRST = replace(WHOLE, text_encoder_learning_rate=2e-3)
SECOND = replace(WHOLE, text_encoder_2_learning_rate=4e-3)
BOTH = replace(WHOLE, text_encoder_learning_rate=2e-3, text_encoder_2_learning_rate=4e-3)
LONG = ", ".join(f"word{number}" for number in range(40))


def learner_of(base: SDXLBase, config: TrainConfig, dtype: torch.dtype = torch.float32) -> TrainableSDXL:
    return trainable(base, replace(config, precision={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]))


def batch_of(base: SDXLBase, pictures: Path, cache: Path, learner: TrainableSDXL, **settings: Any) -> Batch:
    return data_of(base, load(pictures), cache, **settings).batch(
        PassOfUpdate(
            0,
            (
                0,
                1,
                2,
            ),
        )
    )


def text(learner: TrainableSDXL, batch: Batch) -> tuple[Tensor, Tensor]:
    assert learner.encoders
    embeds, pooled = learner.encoders(batch.captions, batch.embeds, batch.pooled)
    assert embeds is not None and pooled is not None
    return embeds, pooled


def shake(learner: TrainableSDXL) -> None:
    """Moves everything that learns away from its start."""
    values = torch.randn(learner.flat.values.shape, generator=torch.Generator().manual_seed(0))
    learner.flat.assign(0.1 * values)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    return {
        "text_encoder_learning_rate": config.text_encoder_learning_rate,
        "text_encoder_2_learning_rate": config.text_encoder_2_learning_rate,
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", [FIRST, SECOND, BOTH], ids=["first", "second", "both"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_before_the_first_step_a_caption_reads_as_it_does_from_the_cache(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, config: TrainConfig, chunks: int
) -> None:
    (tmp_path / "long").mkdir()
    for file in pictures.iterdir():
        (tmp_path / "long" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "long" / "1.txt").write_text(LONG)
    config = replace(config, caption_chunks=chunks)
    learner = learner_of(micro_base, config)
    cached = batch_of(micro_base, tmp_path / "long", cache, learner, caption_chunks=chunks)
    batch = batch_of(micro_base, tmp_path / "long", cache, learner, caption_chunks=chunks, **settings_of(config))
    assert batch.captions == cached.captions and LONG in batch.captions
    assert cached.embeds is not None and cached.pooled is not None
    embeds, pooled = text(learner, batch)
    torch.testing.assert_close(embeds, cached.embeds, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(pooled, cached.pooled, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_an_encoder_that_stands_still_is_read_from_the_disk(micro_base: SDXLBase, pictures: Path, cache: Path) -> None:
    for config, still in ((FIRST, slice(8, 20)), (SECOND, slice(0, 8))):
        learner = learner_of(micro_base, config)
        shake(learner)
        batch = batch_of(micro_base, pictures, cache, learner, **settings_of(config))
        embeds, pooled = text(learner, batch)
        assert batch.embeds is not None and batch.pooled is not None
        learning = slice(0, 8) if still.start else slice(8, 20)
        assert torch.equal(embeds[..., still], batch.embeds[..., still])
        assert not torch.allclose(embeds[..., learning], batch.embeds[..., learning])
        assert torch.equal(pooled, batch.pooled) == (config is FIRST)


def test_with_both_learning_no_caption_is_cached_and_the_run_says_so(
    trained: Trained, micro_base: SDXLBase, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sdxl_lora")
    data = data_of(micro_base, load(pictures), tmp_path / "empty", **settings_of(BOTH))
    assert not data.prompt_files and not (tmp_path / "empty" / "prompts").exists()
    assert "text_encoder_2 is trained: it reads the captions in every step" in caplog.text
    report = trained(replace(BOTH, steps=1)).report
    assert report.text_encoders.startswith("text_encoder and text_encoder_2 read the captions in every step")
    assert trained().report.text_encoders is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter": "dora"}, {"adapter": "loha"}, {"adapter": "lokr"}, {"init": "pissa"}, {"use_rslora": True}],
    ids=["lora", "dora", "loha", "lokr", "pissa", "rslora"],
)
@torch.no_grad()
def test_the_file_merged_into_the_encoders_says_what_the_learner_says(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(BOTH, target_modules="attention+ff", **settings)
    learner = learner_of(micro_base, config)
    shake(learner)
    write_lora(tmp_path / "x.safetensors", learner.learned(), torch.float32)
    file = read_lora(tmp_path / "x.safetensors")
    encoders = []
    for part in ("text_encoder", "text_encoder_2"):
        encoder = load_part(micro_base, part, torch.float32)
        assert not merge_into(encoder, file.parts()[part], 1.0).missing
        encoders.append(encoder)
    learner.eval()
    captions = ("picture number 1", "")
    assert learner.encoders
    embeds, pooled = learner.encoders(captions, None, None)
    wanted, wanted_pooled = encode_prompt_sdxl(captions, load_tokenizers(micro_base), encoders)
    torch.testing.assert_close(embeds, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, wanted_pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_loss(micro_base: SDXLBase, pictures: Path, cache: Path) -> None:
    """Along a random direction, against the difference quotient."""
    learner = learner_of(micro_base, BOTH).train()
    shake(learner)
    batch = batch_of(micro_base, pictures, cache, learner, **settings_of(BOTH))
    learner.losses(batch).sum().backward()
    learner.flat.collect()
    assert learner.encoders
    for adapter in learner.encoders.adapters.values():
        learned = [p for group in adapter.groups for p in group.parameters]
        draw = torch.Generator().manual_seed(5)
        directions = [torch.randn(p.shape, generator=draw) for p in learned]
        slope = sum(((p.grad * d).sum() for p, d in zip(learned, directions, strict=True)), torch.zeros(()))
        ends = []
        with torch.no_grad():
            for step in (1e-2, -2e-2):
                for p, d in zip(learned, directions, strict=True):
                    p += step * d
                learner.flat.refresh()
                ends.append(learner.losses(batch).sum())
            for p, d in zip(learned, directions, strict=True):
                p += 1e-2 * d
        assert slope.abs() > 1e-5
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, slope, rtol=0.03, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "prefixes"),
    [
        (WHOLE, {"lora_unet"}),
        (FIRST, {"lora_unet", "lora_te1"}),
        (SECOND, {"lora_unet", "lora_te2"}),
        (replace(BOTH, learning_rate=1e-4, train_unet=False), {"lora_te1", "lora_te2"}),
    ],
    ids=["none", "first", "second", "encoders alone"],
)
def test_the_file_holds_what_learned(trained: Trained, config: TrainConfig, prefixes: set[str]) -> None:
    tensors = load_file(trained(config).lora_path)
    assert {name[: name.index("_", 6)] for name in tensors} == prefixes
    moved = {name[: name.index("_", 6)] for name, tensor in tensors.items() if "lora_up" in name and tensor.abs().max()}
    assert moved == prefixes


@pytest.mark.slow
def test_target_modules_choose_the_encoders_layers(micro_base: SDXLBase) -> None:
    for preset, ends in (("attention", 4), ("attention+ff", 6), ("all-linear", 6)):
        learned = learner_of(micro_base, replace(BOTH, target_modules=preset)).learned()  # type: ignore[arg-type]
        assert len(learned.text_encoder) == 3 * ends and len(learned.text_encoder_2) == 4 * ends
        assert all(name.startswith("text_model.encoder.layers.") for name in learned.text_encoder_2)


def test_each_encoder_learns_at_its_own_rate(micro_base: SDXLBase, trained: Trained) -> None:
    factors = {group.rate_factor for group in learner_of(micro_base, BOTH).flat.groups}
    assert sorted(factors) == pytest.approx([1, 2, 4])
    slow = load_file(trained(replace(BOTH, steps=1)).lora_path)
    fast = load_file(trained(replace(BOTH, steps=1, text_encoder_2_learning_rate=8e-3)).lora_path)
    name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    torch.testing.assert_close(fast[name], 2 * slow[name])  # Adam's first step is the rate times the gradient's sign
    name = name.replace("te2", "te1")
    assert torch.equal(fast[name], slow[name])


def test_a_run_with_encoders_resumes_exactly(run: Train) -> None:
    config = replace(
        BOTH, steps=6, lora_plus_ratio=4.0, dropout=0.2, ema_decay=0.9, caption_dropout=0.3, gradient_accumulation=2
    )
    whole = run(config)
    for step in (2, 3):
        with pytest.raises(Cancelled):
            run(config, where="b", on_step=cancel_at(step))
    assert lora_bytes(run(config, where="b")) == lora_bytes(whole)


def test_continuing_a_file_starts_at_its_effect(run: Train, micro_base: SDXLBase, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    first = learner_of(micro_base, BOTH)
    shake(first)
    write_lora(file, first.learned(), torch.float32)
    again = learner_of(micro_base, replace(BOTH, continue_from=str(file))).learned()
    for part, modules in first.learned().parts().items():
        for name, module in modules.items():
            found = again.parts()[part][name]
            torch.testing.assert_close(found.change(CPU) * found.scale, module.change(CPU) * module.scale)
    with pytest.raises(ValueError, match=r"which changes the text_encoder_2.*set text_encoder_2_learning_rate"):
        run(replace(FIRST, continue_from=str(file)))
    write_lora(file, LoRAFile(unet=first.learned().unet), torch.float32)
    added = learner_of(micro_base, replace(FIRST, continue_from=str(file))).learned()
    assert all(module.up.abs().max() == 0 for module in added.text_encoder.values() if isinstance(module, LoRAModule))
    assert any(module.up.abs().max() > 0 for module in added.unet.values() if isinstance(module, LoRAModule))


def test_samples_while_training_are_drawn_with_the_encoders(trained: Trained, micro_base: SDXLBase) -> None:
    config = replace(BOTH, sample_prompts=("a picture",), sample_every=2, sample_steps=2)
    result, plain = trained(config), trained(BOTH)
    assert lora_bytes(result) == lora_bytes(plain)
    parts = LoadedParts(CPU)
    request = GenerateConfig(prompt="a picture", width=64, height=64, steps=2, cache="off")
    refs = [LoRARef(result.lora_path, "x", 1.0, strength) for strength in (1.0, 0.0)]
    with_text, without = (draw(micro_base, request, [ref], parts=parts)[0] for ref in refs)
    assert (result.samples[0] == with_text.pixels).all() and (with_text.pixels != without.pixels).any()


def test_nothing_that_learns_is_refused() -> None:
    with pytest.raises(ValueError, match="train_unet is off and nothing else is trained"):
        TrainConfig(train_unet=False)
    with pytest.raises(ValueError, match="'prodigy', which finds one rate for all, and there are several"):
        replace(FIRST, optimizer="prodigy", learning_rate=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["kohya", "peft"])
@torch.no_grad()
def test_diffusers_loads_what_the_encoders_learned(micro_base: SDXLBase, tmp_path: Path, format: Any) -> None:
    """diffusers refuses a file with new tokens beside them, so they are left out, as README says."""
    learner = learner_of(micro_base, replace(BOTH, save_format=format, new_tokens="zwx")).eval()
    shake(learner)
    write_lora(tmp_path / "x.safetensors", learner.learned(), torch.float32, format)
    pipeline = StableDiffusionXLPipeline.from_pretrained(micro_base.path, local_files_only=True)
    tensors = load_file(tmp_path / "x.safetensors")
    pipeline.load_lora_weights({key: t for key, t in tensors.items() if not key.startswith("bundle_emb.")})
    wanted, _, wanted_pooled, _ = pipeline.encode_prompt("picture number 1", do_classifier_free_guidance=False)
    assert learner.encoders
    embeds, pooled = learner.encoders(("picture number 1",), None, None)
    torch.testing.assert_close(embeds, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, wanted_pooled, atol=1e-4, rtol=1e-4)
