"""The second pass: what image-to-image makes of the enlarged first image, each of the two cached for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.generation.init_images import start_images
from sdxl_lora_core.generation.png_metadata import PngTexts
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import WatchedParts, cancel_at, draw, hits, pixels, settings

TWICE = settings(hires_scale=1.75, hires_denoise=0.4, hires_steps=2)
LARGE = {"width": 112, "height": 112}


def by_hand(base: SDXLBase, first: np.ndarray, masks: Sequence[np.ndarray] = (), **changes: Any) -> np.ndarray:
    larger = np.asarray(Image.fromarray(first.astype(np.uint8)).resize((112, 112), Image.Resampling.LANCZOS))
    config = settings(**{**LARGE, "steps": 2, "denoise": 0.4, **changes})
    return pixels(base, config, starts=start_images(config, [larger], masks=masks))


def test_it_is_image_to_image_on_the_enlarged_image(micro_base: SDXLBase) -> None:
    (first,) = pixels(micro_base, settings())
    second = pixels(micro_base, TWICE)
    assert second.shape == (1, 112, 112, 3)
    np.testing.assert_array_equal(second, by_hand(micro_base, first))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"hires_denoise": 0.8}, {"hires_steps": 0}, {"hires_scale": 1.5}], ids=str)
def test_each_setting_acts_on_pixels_and_key(micro_base: SDXLBase, changes: dict[str, Any]) -> None:
    (plain,), (other,) = (draw(micro_base, config) for config in (TWICE, dataclasses.replace(TWICE, **changes)))
    assert plain.key != other.key
    assert plain.pixels.shape != other.pixels.shape or abs(plain.pixels.astype(int) - other.pixels).max() > 0


@pytest.mark.slow
def test_zero_steps_are_those_of_the_first_pass(micro_base: SDXLBase) -> None:
    (first,) = pixels(micro_base, settings())
    same = pixels(micro_base, dataclasses.replace(TWICE, hires_steps=0))
    np.testing.assert_array_equal(same, by_hand(micro_base, first, steps=3))


def test_images_are_counted_in_each_pass(micro_base: SDXLBase) -> None:
    words: list[str] = []
    draw(micro_base, dataclasses.replace(TWICE, count=2, steps=1, hires_steps=1), on_detail=words.append)
    first = ["image 1 of 2, step 1 of 1", "image 2 of 2, step 1 of 1"]
    assert words == first + [f"second pass: {said}" for said in first]


def test_both_images_are_in_the_cache(micro_base: SDXLBase, tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache_folder": tmp_path / "images"}
    (made,) = draw(micro_base, TWICE, **cache)
    assert hits(draw(micro_base, TWICE, parts=WatchedParts(broken="unet"), **cache)) == [True]
    assert hits(draw(micro_base, settings(), **cache)) == [True]
    calls: list[tuple[int, int]] = []
    stronger = dataclasses.replace(TWICE, hires_denoise=0.5)
    assert hits(draw(micro_base, stronger, **cache, on_step=lambda *step: calls.append(step))) == [False]
    assert calls == [(done, 2) for done in range(3)]  # nothing of the first pass
    (again,) = draw(micro_base, TWICE, **cache)
    np.testing.assert_array_equal(again.pixels, made.pixels)


def test_a_found_image_needs_no_first_one(micro_base: SDXLBase, tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache_folder": tmp_path / "images"}
    draw(micro_base, TWICE, **cache)
    (first,) = draw(micro_base, settings(), **cache)
    for file in (tmp_path / "images").rglob(f"{first.key}/*"):
        file.unlink()
    assert hits(draw(micro_base, TWICE, **cache)) == [True]
    only = dataclasses.replace(TWICE, cache="only", hires_steps=3)
    with pytest.raises(ValueError, match="cache is 'only' and 1 of 1 images are not in the cache"):
        draw(micro_base, only, **cache)


def test_progress_counts_both_passes_as_one(micro_base: SDXLBase, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    two = dataclasses.replace(TWICE, count=2)
    draw(micro_base, settings(), cache_folder=tmp_path / "images")
    draw(micro_base, two, cache_folder=tmp_path / "images", on_step=lambda *step: calls.append(step))
    assert list(dict.fromkeys(calls)) == [(done, 3 + 4) for done in range(8)]  # one first image was there


def test_cancelling_keeps_what_the_first_pass_made(micro_base: SDXLBase, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(micro_base, TWICE, cache_folder=tmp_path / "images", on_step=cancel_at(4))
    assert hits(draw(micro_base, settings(), cache_folder=tmp_path / "images")) == [True]


def test_a_mask_holds_in_both_passes(micro_base: SDXLBase) -> None:
    config = dataclasses.replace(TWICE, denoise=0.7)
    picture = np.full((64, 64, 3), 128, np.uint8)
    begin = start_images(config, [picture], masks=[half(64)])
    (first,) = pixels(micro_base, config.first_pass, starts=begin)
    found = pixels(micro_base, config, starts=begin)
    np.testing.assert_array_equal(found, by_hand(micro_base, first, masks=[half(112)]))
    assert abs(found - by_hand(micro_base, first)).max() > 0


def half(side: int) -> np.ndarray:
    mask = np.zeros((side, side), np.float32)
    mask[:, side // 2 :] = 1
    return mask


def test_the_latents_are_the_larger_ones(micro_base: SDXLBase, tmp_path: Path) -> None:
    config = dataclasses.replace(TWICE, keep_latents=True)
    for hit in (False, True):
        (image,) = draw(micro_base, config, cache_folder=tmp_path / "images")
        assert image.hit is hit and image.latents is not None and image.latents.shape == (4, 14, 14)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hires_scale": 0.5}, "hires_scale is 0.5: give a value from 1 to 4"),
        ({"hires_scale": 4, "width": 4096}, "hires_scale is 4, and for the second pass width is 16384"),
        ({"hires_scale": 2, "hires_denoise": 0.02, "steps": 25}, "for the second pass denoise is 0.02 with 25 steps"),
        ({"hires_denoise": 0}, "hires_denoise is 0"),
        ({"hires_steps": -1}, "hires_steps is -1"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_the_png_says_it_as_a1111_does(micro_base: SDXLBase) -> None:
    text = PngTexts(micro_base, TWICE).parameters("a red circle", 5)
    assert "Size: 64x64" in text
    assert "Denoising strength: 0.4, Hires upscale: 1.75, Hires steps: 2, Hires upscaler: Lanczos" in text
    assert "Hires" not in PngTexts(micro_base, settings()).parameters("a red circle", 5)
    assert "Denoising strength: 0.3" in PngTexts(micro_base, settings(denoise=0.3)).parameters("a red circle", 5)


@pytest.mark.slow
def test_large_images_are_decoded_in_tiles(micro_base: SDXLBase) -> None:
    parts = WatchedParts()

    def decoded(**changes: Any) -> int:
        config = settings(width=192, steps=1, **changes)
        calls: list[Any] = []
        count: Callable[..., None] = lambda module, inputs: calls.append(inputs)  # noqa: E731
        draw(micro_base, config, parts=parts)
        hook = parts.held("vae").decoder.register_forward_pre_hook(count)
        draw(micro_base, config, parts=parts)
        hook.remove()
        return len(calls)

    assert [decoded(vae_tiling_from=side) for side in (2048, 200, 192, 0)] == [1, 1, 2, 1]
    assert decoded(vae_tiling=True, vae_tiling_from=0) == 2
    keys = [draw(micro_base, settings(width=192, steps=1, vae_tiling_from=side))[0].key for side in (2048, 200, 192)]
    assert keys[0] == keys[1] != keys[2]
