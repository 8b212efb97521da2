"""Images that start from a picture or latents, the whole of it or a masked part, against diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.image_keys import start_settings
from sdxl_lora_core.generation.init_images import StartImage, start_images
from sdxl_lora_core.generation.job import GenerationJob
from sdxl_lora_core.images.crop import fit_image
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import WatchedParts, draw, hits, settings
from tools.run_workflow import load_pack

SIDE = 64


def picture(seed: int = 0, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


def half_mask(width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """The right half is painted anew."""
    mask = np.zeros((height, width), np.float32)
    mask[:, width // 2 :] = 1
    return mask


def made(base: SDXLBase, config: GenerateConfig, starts: list[StartImage]) -> np.ndarray:
    return np.stack([image.pixels for image in draw(base, config, starts=starts)]).astype(int)


def reference(folder: Path, kind: str, config: GenerateConfig, **arguments: Any) -> np.ndarray:
    """Diffusers as its documentation uses it; its steps are those of the whole schedule."""
    import diffusers

    pipeline = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline").from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=config.scheduler == "karras", timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        config.prompt,
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance,
        num_inference_steps=round(config.steps / config.denoise),
        strength=config.denoise,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="np",
        **arguments,
    ).images[0]
    return image * 255


# The image itself


@pytest.mark.slow
@pytest.mark.parametrize("denoise", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("schedule", ["karras", "sgm_uniform"])
def test_image_to_image_equals_the_plain_pipeline(
    micro_sdxl: Path, micro_base: SDXLBase, denoise: float, schedule: Any
) -> None:
    config = settings(denoise=denoise, scheduler=schedule, steps=6)
    image = made(micro_base, config, start_images(config, [picture()]))[0]
    wanted = reference(micro_sdxl, "Img2Img", config, image=Image.fromarray(picture()))
    assert wanted.std() > 10
    assert abs(image - wanted).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_inpainting_equals_the_plain_pipeline(micro_sdxl: Path, micro_base: SDXLBase, denoise: float) -> None:
    config = settings(denoise=denoise, steps=6)
    image = made(micro_base, config, start_images(config, [picture()], masks=[half_mask()]))[0]
    mask = Image.fromarray((half_mask() * 255).astype(np.uint8))
    wanted = reference(
        micro_sdxl,
        "Inpaint",
        config,
        image=Image.fromarray(picture()),
        mask_image=mask,
        width=SIDE,
        height=SIDE,
    )
    assert abs(image - wanted).max() <= 1
    assert abs(image - made(micro_base, config, start_images(config, [picture()]))[0]).max() > 5


def test_all_steps_are_run(micro_base: SDXLBase) -> None:
    config = settings(denoise=0.3, steps=5)
    seen: list[tuple[int, int]] = []
    draw(
        micro_base,
        config,
        starts=start_images(config, [picture()]),
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(step, 5) for step in range(6)]


def test_latents_go_out_and_in_again(micro_base: SDXLBase) -> None:
    first = draw(micro_base, settings(keep_latents=True))[0]
    assert first.latents is not None and first.latents.shape == (4, SIDE // 8, SIDE // 8)
    assert draw(micro_base, settings())[0].latents is None
    masked = settings(denoise=0.2)
    nearly_all = np.ones((SIDE, SIDE), np.float32)
    nearly_all[:, :8] = 0
    starts = start_images(masked, latents=first.latents[None], masks=[nearly_all])
    second = draw(micro_base, settings(denoise=0.2, keep_latents=True), starts=starts)[0]
    assert second.latents is not None
    torch.testing.assert_close(second.latents[:, :, 0], first.latents[:, :, 0], atol=1e-5, rtol=1e-5)
    assert (second.latents - first.latents).abs().max() > 0.1


@pytest.mark.slow
def test_images_do_not_depend_on_each_other(micro_base: SDXLBase) -> None:
    config = settings(denoise=0.5, count=2)
    pair = [picture(0), picture(1)]
    together = made(micro_base, config, start_images(config, pair))
    for number, start in enumerate(pair):
        alone = settings(denoise=0.5, seed=config.seed + number)
        np.testing.assert_array_equal(together[number], made(micro_base, alone, start_images(alone, [start]))[0])
    one_for_all = made(micro_base, config, start_images(config, pair[:1]))
    np.testing.assert_array_equal(one_for_all[0], together[0])
    batched = settings(denoise=0.5, count=2, batch_size=2)
    assert abs(made(micro_base, batched, start_images(batched, pair, masks=[])) - together).max() <= 1


# Sizes and counts


def test_images_are_scaled_to_cover_and_cut_in_the_middle() -> None:
    wide = np.zeros((50, 200, 3), np.uint8)
    wide[:, 100:] = 255
    fitted = fit_image(wide, 128, 64)
    assert fitted.shape == (64, 128, 3)
    assert fitted[:, :60].max() == 0 and fitted[:, 68:].min() == 255
    same = picture()
    assert fit_image(same, SIDE, SIDE) is same
    for size in ((333, 77), (64, 65), (63, 200)):
        assert fit_image(picture(0, *size), SIDE, SIDE).shape == (SIDE, SIDE, 3)


def test_masks_follow_their_image() -> None:
    config = settings()
    (start,) = start_images(config, [picture(0, 200, 100)], masks=[half_mask(200, 100)])
    assert start.mask is not None and start.mask.shape == (SIDE, SIDE)
    np.testing.assert_array_equal(start.mask, half_mask() > 0)
    one_picture = start_images(config, [picture()], masks=[half_mask(), half_mask()[:, ::-1]])
    assert len(one_picture) == 2 and one_picture[0].key != one_picture[1].key


def test_empty_latents_are_no_start() -> None:
    """As core's Empty Latent Image gives them; what else they could mean is left as it is."""
    nothing = torch.zeros(2, 4, 8, 8)
    assert start_images(settings(), latents=nothing[:1]) == start_images(settings(count=2), latents=nothing) == []
    assert len(start_images(settings(), latents=nothing)) == 2, "which is refused later, with the counts"
    assert len(start_images(settings(denoise=0.9), latents=nothing[:1])) == 1
    assert len(start_images(settings(), latents=nothing[:1], masks=[half_mask()])) == 1
    assert len(start_images(settings(), latents=nothing[:1] + 0.1)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": [picture()], "latents": torch.zeros(1, 4, 8, 8)}, "image and latent are both given.*disconnect"),
        ({"latents": torch.zeros(1, 4, 16, 8)}, "latent is of an image of 64x128, but width and height are"),
        ({"latents": torch.zeros(1, 16, 8, 8)}, r"latent has shape \[1, 16, 8, 8\], SDXL's have"),
        ({"masks": [half_mask()]}, "mask is given without an image or latent"),
        ({"images": [picture()], "masks": [np.zeros((64, 64), np.float32)]}, "mask is empty"),
        ({"images": [picture(0, 96, 80)], "masks": [np.zeros((64, 64), np.float32)]}, "mask is empty"),  # of Load Image
        ({"images": [picture()], "masks": [half_mask(32, 32)]}, "mask is 32x32 and image is 64x64: use a mask of"),
        ({"images": [picture()] * 2, "masks": [half_mask()] * 3}, "2 images are given for 3 starts: give 1 or 3"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_images(settings(), **given)


def test_counts_and_denoise_are_checked_before_anything_is_loaded() -> None:
    two = start_images(settings(), [picture()] * 2)
    nothing: Any = None
    for config, starts, message in (
        (settings(count=3), two, r"2 images or masks.*3 images are requested.*give 1 for all of them, or 3"),
        (settings(denoise=0.5), [], "denoise is 0.5, but there is no start"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(GenerationJob(nothing, config, starts=starts), nothing)
    with pytest.raises(ValueError, match="denoise is 0.02 with 25 steps.*1250 steps.*raise denoise or lower steps"):
        settings(denoise=0.02, steps=25)


# The key


def test_the_key_holds_what_is_used_and_nothing_else(micro_base: SDXLBase) -> None:
    def key(**given: Any) -> Any:
        config = settings(denoise=given.pop("denoise", 0.5))
        (start,) = start_images(config, **given)
        return start_settings(config, start.key)

    image = {"images": [picture()]}
    assert key(**image) == key(images=[picture().copy()])
    other = picture().copy()
    other[0, 0, 0] ^= 1
    keys = [
        key(**image),
        key(images=[other]),
        key(**image, masks=[half_mask()]),
        key(**image, denoise=0.6),
        key(**image, masks=[1 - half_mask()]),
        key(latents=torch.zeros(1, 4, 8, 8)),
        key(latents=torch.ones(1, 4, 8, 8)),
    ]
    assert len({str(one) for one in keys}) == len(keys)
    assert start_settings(settings(), None) == {}


def test_images_are_found_again_by_content(micro_base: SDXLBase, tmp_path: Path) -> None:
    config = settings(denoise=0.5)

    def run(image: np.ndarray, config: GenerateConfig = config) -> Any:
        return draw(micro_base, config, starts=start_images(config, [image]), cache_folder=tmp_path)

    assert hits(run(picture())) == [False]
    assert hits(run(picture().copy())) == [True]
    assert hits(run(picture(1))) == [False]


def test_kept_latents_are_the_same_on_hit_and_miss(micro_base: SDXLBase, tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        return draw(micro_base, settings(**changes), cache_folder=tmp_path)[0]

    run()
    missed = run(keep_latents=True)
    assert not missed.hit, "an image without latents does not serve who asks for them"
    found = run(keep_latents=True)
    assert found.hit and found.key == missed.key
    assert found.latents.dtype == missed.latents.dtype == torch.float32
    assert torch.equal(found.latents, missed.latents)
    assert run().hit
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    healed = run(keep_latents=True)
    assert not healed.hit and torch.equal(healed.latents, missed.latents)
    assert run(keep_latents=True).hit


@pytest.mark.slow
def test_the_vae_comes_and_goes_before_the_unet(micro_base: SDXLBase) -> None:
    parts = WatchedParts(offload=True)
    config = settings(denoise=0.5, count=2)
    draw(micro_base, config, starts=start_images(config, [picture()]), parts=parts)
    moves = [event for event in parts.taken_events() if not event.startswith("load")]
    assert moves[2:6] == ["arrive vae", "leave vae", "arrive unet", "leave unet"]
    assert moves.count("arrive vae") == 3, "one start is encoded once for all images"


@pytest.mark.slow
def test_the_node_takes_images_masks_and_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    pack = load_pack()
    nodes = pack.NODE_CLASS_MAPPINGS
    (base, _) = nodes["LoadSDXLBase"]().load("tiny-sdxl (bundled)", "fp32")["result"]
    wires, host = pack.nodes.wires, pack.nodes.host

    def run(**inputs: Any) -> Any:
        shared = {"prompt": "a red circle", "negative_prompt": "", "seed": 0, "steps": 1, "guidance": 1.0}
        size = {"width": SIDE, "height": SIDE, "count": 1, "sampler": "dpmpp_2m", "scheduler": "karras", "cache": "use"}
        return nodes["SDXLGenerateCached"]().generate(base=base, **shared, **size, **inputs)["result"]

    image = wires.to_image([picture()])
    assert isinstance(run()[3], host.comfy.Nothing)
    first, latent = (run(image=image, denoise=0.1, keep_latents=True)[place] for place in (0, 3))
    assert abs(first - image).mean() < 0.1 and latent["samples"].shape == (1, 4, SIDE // 8, SIDE // 8)
    masked = run(latent={**latent, "noise_mask": torch.from_numpy(half_mask())[None, None]}, keep_latents=True)[3]
    linked = run(latent=latent, mask=torch.from_numpy(half_mask())[None], keep_latents=True)[3]
    assert torch.equal(masked["samples"], linked["samples"])
    left, right = (abs(masked["samples"] - latent["samples"])[..., cells].max() for cells in (slice(4), slice(4, 8)))
    assert left < 1e-5 and right > 0.1
