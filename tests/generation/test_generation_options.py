from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from tests.micro.images import WatchedParts, draw, edit_json, pixels, settings


@pytest.fixture
def parts() -> WatchedParts:
    return WatchedParts()


@pytest.mark.slow
def test_attention_math_holds_for_one_call(micro_base: SDXLBase, parts: WatchedParts) -> None:
    def fast_kernels(attention: str) -> set[bool]:
        seen = set()
        config = settings(attention=attention)
        see = lambda done, total: seen.add(torch.backends.cuda.flash_sdp_enabled()) if done else None  # noqa: E731
        draw(micro_base, config, parts=parts, on_step=see)
        return seen

    assert [fast_kernels(attention) for attention in ("auto", "math", "sdpa")] == [{True}, {False}, {True}]
    assert torch.backends.cuda.flash_sdp_enabled()
    math = pixels(micro_base, settings(attention="math"), parts=parts)
    assert abs(math - pixels(micro_base, settings(), parts=parts)).max() <= 1


@pytest.mark.slow
def test_attention_slicing_is_put_on_and_taken_off(micro_base: SDXLBase, parts: WatchedParts) -> None:
    def processors(**changes: Any) -> set[str]:
        pixels(micro_base, settings(steps=1, **changes), parts=parts)
        return {type(processor).__name__ for processor in parts.held("unet").attn_processors.values()}

    assert processors() == {"AttnProcessor2_0"}
    assert processors(attention_slicing=True) == {"SlicedAttnProcessor"}
    assert processors() == {"AttnProcessor2_0"}
    sliced = pixels(micro_base, settings(attention_slicing=True), parts=parts)
    assert abs(sliced - pixels(micro_base, settings(), parts=parts)).max() <= 1


def test_vae_tiling_is_put_on_and_taken_off(micro_base: SDXLBase, parts: WatchedParts) -> None:
    wide = settings(width=192, steps=1)
    whole = pixels(micro_base, wide, parts=parts)
    calls = []
    parts.held("vae").decoder.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    tiled = pixels(micro_base, settings(width=192, steps=1, vae_tiling=True), parts=parts)
    assert len(calls) > 1
    calls.clear()
    np.testing.assert_array_equal(pixels(micro_base, wide, parts=parts), whole)
    assert len(calls) == 1
    assert abs(tiled - whole).max() > 0


def test_vae_slicing_is_put_on_and_taken_off(micro_base: SDXLBase, parts: WatchedParts) -> None:
    config = {"count": 2, "batch_size": 2, "steps": 1}
    pixels(micro_base, settings(**config), parts=parts)
    calls = []
    parts.held("vae").decoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    for vae_slicing in (True, False):
        pixels(micro_base, settings(**config, vae_slicing=vae_slicing), parts=parts)
    assert calls == [1, 1, 2]


@pytest.mark.slow
def test_room_for_computing_grows_with_what_is_computed_at_once(micro_base: SDXLBase, parts: WatchedParts) -> None:
    def rooms(**changes: Any) -> tuple[int, int]:
        pixels(micro_base, settings(steps=1, **changes), parts=parts)
        return parts.rooms["unet"], parts.rooms["vae"]

    unet, vae = rooms()
    assert rooms(width=128) == (2 * unet, 2 * vae)
    assert rooms(guidance=1) == (unet // 2, vae)
    assert rooms(count=2, batch_size=2) == (2 * unet, 2 * vae)
    assert rooms(count=2, batch_size=2, vae_slicing=True) == (2 * unet, vae)
    assert rooms(width=1280, height=64) == (20 * unet, 20 * vae)
    assert rooms(width=1280, height=64, vae_tiling=True) == (20 * unet, 16 * vae)


def test_offload_by_phase_holds_one_phase_on_the_device(micro_base: SDXLBase, parts: WatchedParts) -> None:
    pixels(micro_base, settings(steps=1, offload="phase"), parts=parts)
    assert [event for event in parts.taken_events() if not event.startswith("load")] == [
        "arrive text_encoders",
        "leave text_encoders",
        "arrive unet",
        "leave unet",
        "arrive vae",
        "leave vae",
    ]


def test_cancelled_phase_leaves_the_device(micro_base: SDXLBase, parts: WatchedParts) -> None:
    def cancel(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(micro_base, settings(offload="phase"), parts=parts, on_step=cancel)
    assert parts.taken_events("leave") == ["leave text_encoders", "leave unet"]


@pytest.mark.parametrize(("option", "owner", "leaves"), [("auto", True, 3), ("auto", False, 0), ("none", True, 0)])
def test_offload_auto_is_the_owners_choice(micro_base: SDXLBase, option: str, owner: bool, leaves: int) -> None:
    parts = WatchedParts(offload=owner)
    pixels(micro_base, settings(steps=1, offload=option), parts=parts)
    assert len(parts.taken_events("leave")) == leaves


@pytest.mark.slow
def test_drop_all_lets_go(micro_base: SDXLBase, parts: WatchedParts) -> None:
    pixels(micro_base, settings(steps=1), parts=parts)
    parts.drop_all()
    parts.taken_events()
    pixels(micro_base, settings(steps=1), parts=parts)
    assert len(parts.taken_events("load")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("forced", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_vae_of_a_half_precision_base(
    micro_copy: Callable[[], Path], parts: WatchedParts, forced: bool, dtype: torch.dtype
) -> None:
    folder = micro_copy()
    edit_json(folder / "vae" / "config.json", force_upcast=forced)
    made = pixels(open_base(folder, "fp16"), settings(), parts=parts)
    assert (parts.held("unet").dtype, parts.held("vae").dtype) == (torch.float16, dtype)
    assert abs(made - pixels(open_base(folder, "fp32"), settings())).mean() < 5


@pytest.mark.parametrize(("part", "word"), [("unet", "UNet"), ("vae", "VAE")])
def test_image_that_is_not_finite_is_an_error_with_a_remedy(
    micro_base: SDXLBase, tmp_path: Path, part: str, word: str
) -> None:
    with pytest.raises(ValueError, match=f"{word} returned .* not finite .*precision to fp32 or bf16"):
        draw(micro_base, settings(steps=1), parts=WatchedParts(broken=part), cache_folder=tmp_path)
    assert not list(tmp_path.rglob("*.png"))
