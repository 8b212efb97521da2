from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import TRAINED, WatchedParts, draw, hits, pixels, settings, weighted, write_lora


@pytest.fixture
def parts() -> WatchedParts:
    return WatchedParts()


@pytest.fixture(scope="session")
def lora(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> LoRARef:
    return write_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", micro_base, seed=1)


@pytest.fixture(scope="session")
def unet_lora(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> LoRARef:
    path = tmp_path_factory.mktemp("loras") / "unet.safetensors"
    return write_lora(path, micro_base, seed=2, trained={"unet": TRAINED["unet"]})


def test_strengths_act_on_their_own_parts(micro_base: SDXLBase, lora: LoRARef) -> None:
    bare = pixels(micro_base, settings())
    model = pixels(micro_base, settings(), [weighted(lora, 1.0, 0.0)])
    clip = pixels(micro_base, settings(), [weighted(lora, 0.0, 1.0)])
    both = pixels(micro_base, settings(), [lora])
    for one, other in [(bare, model), (bare, clip), (model, clip), (model, both), (clip, both)]:
        assert abs(one - other).max() > 1


def test_the_same_file_twice_acts_twice(micro_base: SDXLBase, lora: LoRARef) -> None:
    once = weighted(lora, 0.5, 0.25)
    twice = pixels(micro_base, settings(), [once, once])
    assert abs(twice - pixels(micro_base, settings(), [once])).max() > 1
    assert abs(twice - pixels(micro_base, settings(), [weighted(lora, 1.0, 0.5)])).max() <= 1


def test_strength_zero_costs_nothing(micro_base: SDXLBase, tmp_path: Path) -> None:
    cache = tmp_path / "images"
    (tmp_path / "broken.safetensors").write_text("never read")
    off = LoRARef(tmp_path / "broken.safetensors", "broken", 0.0, 0.0)
    bare = draw(micro_base, settings(), cache_folder=cache)
    assert hits(draw(micro_base, settings(), [off], cache_folder=cache)) == [True]
    assert draw(micro_base, settings(), [off])[0].key == bare[0].key


@pytest.mark.slow
def test_only_what_changed_is_loaded_again(
    micro_base: SDXLBase, parts: WatchedParts, lora: LoRARef, unet_lora: LoRARef
) -> None:
    def done(*stack: LoRARef, **changes: Any) -> list[str]:
        draw(micro_base, settings(**{"steps": 1, **changes}), stack, parts=parts)
        return [event for event in parts.taken_events() if event.startswith(("load", "change"))]

    assert done() == ["load text_encoders", "load unet", "load vae"]
    assert done(prompt="other", seed=1, steps=2, width=72, guidance=2) == []
    assert done(unet_lora) == ["change unet"]
    assert done(weighted(unet_lora, 1.0, 0.3)) == []  # the file has no text modules
    assert done(weighted(unet_lora, 0.5, 0.3)) == ["change unet"]
    assert done(lora) == ["change text_encoders", "change unet"]
    assert done(weighted(lora, 1.0, 0.5)) == ["change text_encoders"]


def test_cached_images_say_how_the_loras_fitted(micro_base: SDXLBase, lora: LoRARef, tmp_path: Path) -> None:
    made, found = (draw(micro_base, settings(steps=1), [lora], cache_folder=tmp_path)[0] for _ in range(2))
    assert not made.hit and found.hit
    assert found.lora_fit == made.lora_fit and "modules are in this base" in found.lora_fit[0]
    (manifest,) = tmp_path.rglob("manifest.json")
    stored = json.loads(manifest.read_text())
    del stored["lora_fit"]
    manifest.write_text(json.dumps(stored))  # as before version 0.4
    (older,) = draw(micro_base, settings(steps=1), [lora], cache_folder=tmp_path)
    assert older.hit and older.lora_fit == ()


def test_taking_the_stack_off_restores_the_base(micro_base: SDXLBase, lora: LoRARef) -> None:
    before = pixels(micro_base, settings())
    pixels(micro_base, settings(), [lora])
    np.testing.assert_array_equal(pixels(micro_base, settings()), before)


def with_more(path: Path, lora: LoRARef, **tensors: torch.Tensor) -> LoRARef:
    save_file({**load_file(lora.path), **{name.replace("__", "."): value for name, value in tensors.items()}}, path)
    return LoRARef(path, path.stem, 1.0, 1.0)


def test_what_is_not_understood_is_said_once(
    micro_base: SDXLBase, parts: WatchedParts, lora: LoRARef, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = with_more(tmp_path / "odd.safetensors", lora, lora_unet_mystery__a1__weight=torch.ones(2, 2))
    (image,) = draw(micro_base, settings(steps=1), [odd], parts=parts)
    lines = image.lora_fit
    said = "1 keys of its file are unknown (first: lora_unet_mystery.a1.weight)"
    assert sum(said in line for line in lines) == 1 and lines[-1].endswith(said)
    assert caplog.text.count(said) == 1


def test_a_text_module_that_the_base_lacks_does_not_refuse_the_rest(
    micro_base: SDXLBase, unet_lora: LoRARef, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factors = {"lora_down": torch.ones(2, 8), "lora_up": torch.ones(8, 2)}
    odd = with_more(
        tmp_path / "odd.safetensors",
        unet_lora,
        **{f"lora_te1_text_projection__{name}__weight": factor for name, factor in factors.items()},
    )
    np.testing.assert_array_equal(pixels(micro_base, settings(), [odd]), pixels(micro_base, settings(), [unet_lora]))
    assert "0 of 1 text_encoder modules are in this base (first missing: text_projection)" in caplog.text


def test_a_lora_that_does_not_fit_leaves_what_is_loaded(
    micro_base: SDXLBase, parts: WatchedParts, lora: LoRARef, tmp_path: Path
) -> None:
    before = pixels(micro_base, settings(), [lora], parts=parts)
    wrong = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 5),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(5, 2),
    }
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="use a LoRA that was trained on a model of this size"):
        draw(micro_base, settings(), [LoRARef(tmp_path / "wrong.safetensors", "wrong", 1.0, 1.0)], parts=parts)
    parts.taken_events()
    np.testing.assert_array_equal(pixels(micro_base, settings(), [lora], parts=parts), before)
    assert not parts.taken_events("load")


@pytest.mark.slow
def test_pefts_settings_beside_a_file_count_as_its_content(micro_base: SDXLBase, lora: LoRARef, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(lora.path.read_bytes())
    ref = LoRARef(path, "adapter_model", 1.0, 1.0)
    parts = WatchedParts()

    def drawn(alpha: int | None) -> Any:
        settings_file = tmp_path / "adapter_config.json"
        settings_file.unlink(missing_ok=True)
        if alpha:
            settings_file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
        return draw(micro_base, settings(), [ref], parts=parts)[0]

    plain, strong, weak = drawn(None), drawn(8), drawn(1)
    assert len({plain.key, strong.key, weak.key}) == 3
    assert abs(strong.pixels.astype(int) - weak.pixels).max() > 1
    assert abs(drawn(4).pixels.astype(int) - plain.pixels).max() <= 1, "an alpha of the rank is a scale of 1"


def test_missing_lora_is_named(micro_base: SDXLBase, tmp_path: Path, parts: WatchedParts) -> None:
    gone = LoRARef(tmp_path / "gone.safetensors", "gone", 1.0, 1.0)
    with pytest.raises(FileNotFoundError, match="LoRA gone does not exist"):
        draw(micro_base, settings(), [gone], parts=parts)
    assert not parts.events


def test_lora_that_fits_nowhere_is_refused_and_then_forgotten(micro_base: SDXLBase, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    stem = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{stem}.lora_A.weight": torch.ones(4, 8), f"{stem}.lora_B.weight": torch.ones(8, 4)}, path)
    with pytest.raises(ValueError, match="LoRA foreign: none of its 1 unet modules"):
        draw(micro_base, settings(), [LoRARef(path, "foreign", 1.0, 1.0)])
    np.testing.assert_array_equal(pixels(micro_base, settings()), pixels(micro_base, settings()))


def test_lora_that_fits_in_part_is_warned_about(
    micro_base: SDXLBase, tmp_path: Path, lora: LoRARef, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "half.safetensors"
    stem = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    extra = {f"{stem}.lora_A.weight": torch.ones(4, 8), f"{stem}.lora_B.weight": torch.ones(8, 4)}
    save_file({**load_file(lora.path), **extra}, path)
    half = pixels(micro_base, settings(), [LoRARef(path, "half", 1.0, 1.0)])
    np.testing.assert_array_equal(half, pixels(micro_base, settings(), [lora]))
    assert "LoRA half" in caplog.text and "down_blocks.7" in caplog.text
