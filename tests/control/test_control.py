"""Images steered by ControlNets, against diffusers' own pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.control.config import CONTROL_TYPES, ControlConfig
from sdxl_lora_core.control.control import Control
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.image_keys import control_settings
from sdxl_lora_core.generation.init_images import start_images
from sdxl_lora_core.generation.samplers import SOLVERS, Sampler
from sdxl_lora_core.images.crop import fit_image
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.generation import plain_diffusers
from tests.generation.test_guidance import plain_pipeline
from tests.generation.test_init_images import half_mask, picture
from tests.micro.controls import SIDE, control, hint, random_net, save_single
from tests.micro.images import WatchedParts, cancel_at, draw, hits, pixels, settings
from tools.run_workflow import load_pack

CANNY = CONTROL_TYPES[4]


@pytest.fixture(scope="module")
def nets(micro_base: SDXLBase) -> list[Any]:
    return [random_net(micro_base, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def union(micro_base: SDXLBase) -> Any:
    return random_net(micro_base, 3, union=True)


@pytest.fixture(scope="module")
def files(nets: list[Any], union: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets and a union."""
    folder = tmp_path_factory.mktemp("controlnet")
    return [save_single(folder / f"{name}.safetensors", net) for name, net in zip("abu", [*nets, union], strict=True)]


def reference(folder: Path, kind: str, config: GenerateConfig, **arguments: Any) -> np.ndarray:
    """Diffusers as its documentation uses it; its steps are those of the whole schedule."""
    import diffusers

    pipeline_class = getattr(diffusers, f"StableDiffusionXLControlNet{kind}Pipeline")
    pipeline = pipeline_class.from_pretrained(
        folder, controlnet=arguments.pop("controlnet"), torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        config.prompt,
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance,
        num_inference_steps=config.schedule_steps,
        width=config.width,
        height=config.height,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="np",
        **arguments,
    ).images[0]
    return image * 255


def made(base: SDXLBase, config: GenerateConfig, *controls: Control, **options: Any) -> np.ndarray:
    return pixels(base, config, controls=controls, **options)[0]


# The image itself


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [7.0, 1.0])
def test_one_net_equals_the_plain_pipeline(
    micro_sdxl: Path, micro_base: SDXLBase, nets: list[Any], files: list[Path], guidance: float
) -> None:
    config = settings(steps=10, width=80, negative_prompt="a blue square", guidance=guidance)
    drawing = hint(width=80)
    image = made(micro_base, config, control(files[0], drawing, strength=0.8))
    wanted = reference(
        micro_sdxl,
        "",
        config,
        controlnet=nets[0],
        image=Image.fromarray(drawing),
        controlnet_conditioning_scale=0.8,
    )
    assert abs(image - wanted).max() <= 1
    assert abs(image - pixels(micro_base, config)[0]).max() > 20


@pytest.mark.slow
def test_two_nets_equal_the_plain_pipeline_in_either_order(
    micro_sdxl: Path, micro_base: SDXLBase, nets: list[Any], files: list[Path]
) -> None:
    from diffusers import MultiControlNetModel

    config = settings(steps=10)
    pair = [control(files[0], hint(1), strength=0.7), control(files[1], hint(2), strength=0.4)]
    image = made(micro_base, config, *pair)
    wanted = reference(
        micro_sdxl,
        "",
        config,
        controlnet=MultiControlNetModel(nets),
        image=[Image.fromarray(hint(1)), Image.fromarray(hint(2))],
        controlnet_conditioning_scale=[0.7, 0.4],
    )
    assert abs(image - wanted).max() <= 1
    assert abs(image - made(micro_base, config, *pair[::-1])).max() <= 1
    for one in pair:
        assert abs(image - made(micro_base, config, one)).max() > 10


@pytest.mark.slow
def test_image_to_image_equals_the_plain_pipeline(
    micro_sdxl: Path, micro_base: SDXLBase, nets: list[Any], files: list[Path]
) -> None:
    config = settings(denoise=0.5, steps=6)
    starts = start_images(config, [picture()])
    image = made(micro_base, config, control(files[0]), starts=starts)
    wanted = reference(
        micro_sdxl,
        "Img2Img",
        config,
        controlnet=nets[0],
        strength=0.5,
        image=Image.fromarray(picture()),
        control_image=Image.fromarray(hint()),
        controlnet_conditioning_scale=1.0,
    )
    assert abs(image - wanted).max() <= 1
    assert abs(image - made(micro_base, config, starts=starts)).max() > 5


@pytest.mark.slow
def test_inpainting_equals_the_plain_pipeline(
    micro_sdxl: Path, micro_base: SDXLBase, nets: list[Any], files: list[Path]
) -> None:
    config = settings(denoise=0.5, steps=6)
    starts = start_images(config, [picture()], masks=[half_mask()])
    image = made(micro_base, config, control(files[0]), starts=starts)
    wanted = reference(
        micro_sdxl,
        "Inpaint",
        config,
        controlnet=nets[0],
        strength=0.5,
        image=Image.fromarray(picture()),
        mask_image=Image.fromarray((half_mask() * 255).astype(np.uint8)),
        control_image=Image.fromarray(hint()),
        controlnet_conditioning_scale=1.0,
    )
    assert abs(image - wanted).max() <= 1
    assert abs(image - made(micro_base, config, starts=starts)).max() > 5


@pytest.mark.slow
@pytest.mark.parametrize("control_type", [CANNY, "depth", "repaint"])
def test_a_union_equals_the_plain_pipeline(
    micro_sdxl: Path, micro_base: SDXLBase, union: Any, files: list[Path], control_type: Any
) -> None:
    config = settings(steps=10)
    image = made(micro_base, config, control(files[2], strength=0.9, control_type=control_type))
    wanted = reference(
        micro_sdxl,
        "Union",
        config,
        controlnet=union,
        control_image=Image.fromarray(hint()),
        control_mode=CONTROL_TYPES.index(control_type) - 1,
        controlnet_conditioning_scale=0.9,
    )
    assert abs(image - wanted).max() <= 1
    assert abs(image - made(micro_base, config)).max() > 10


@pytest.mark.slow
@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_with_every_sampler(
    micro_sdxl: Path, micro_base: SDXLBase, nets: list[Any], files: list[Path], sampler: Sampler
) -> None:
    from diffusers import StableDiffusionXLControlNetPipeline

    def steered(plain: Any) -> Any:
        pipeline = StableDiffusionXLControlNetPipeline(**plain.components, controlnet=nets[0], add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    if sampler == "dpmpp_sde":
        pytest.importorskip("torchsde")
    config = settings(steps=8, sampler=sampler, scheduler=SOLVERS[sampler].schedules[0])
    wanted = plain_diffusers.reference(micro_sdxl, config, steered=steered, image=Image.fromarray(hint()))
    assert abs(made(micro_base, config, control(files[0])) - wanted).max() <= 1
    assert abs(wanted - plain_diffusers.reference(micro_sdxl, config)).max() > 5


# The interval


def by_hand(folder: Path, net: Any, config: GenerateConfig, interval: tuple[float, float]) -> np.ndarray:
    """The denoising loop written out, with the ControlNet where the noise level lies in the interval."""
    pipeline = plain_pipeline(folder)
    wanted, unwanted, pooled, unwanted_pooled = pipeline.encode_prompt(
        config.prompt, negative_prompt=config.negative_prompt
    )
    sizes = torch.tensor([[config.height, config.width, 0, 0, config.height, config.width]], dtype=torch.float32)
    picture = torch.from_numpy(hint().copy()).permute(2, 0, 1)[None] / 255
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(config.seed))
    pipeline.scheduler.set_timesteps(config.steps)

    def predicted(latents: Any, time: Any, text: Any, pooled: Any) -> Any:
        shared = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        if not interval[0] <= 1 - float(time) / 999 <= interval[1]:
            return pipeline.unet(latents, time, **shared).sample
        down, middle = net(latents, time, controlnet_cond=picture, return_dict=False, **shared)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return pipeline.unet(latents, time, **shared, **added).sample

    with torch.no_grad():
        for time in pipeline.scheduler.timesteps:
            noise = predicted(latents, time, wanted, pooled)
            free = predicted(latents, time, unwanted, unwanted_pooled)
            noise = free + config.guidance * (noise - free)
            latents = pipeline.scheduler.step(noise, time, latents).prev_sample
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (0.3, 0.6)])
def test_interval_equals_the_loop_written_out(
    micro_sdxl: Path, micro_base: SDXLBase, nets: list[Any], files: list[Path], interval: tuple[float, float]
) -> None:
    config = settings(steps=10, negative_prompt="a blue square")
    image = made(micro_base, config, control(files[0], start_percent=interval[0], end_percent=interval[1]))
    assert abs(image - by_hand(micro_sdxl, nets[0], config, interval)).max() <= 1


def test_an_interval_without_a_step_changes_nothing(micro_base: SDXLBase, files: list[Path]) -> None:
    config = settings(steps=4, scheduler="sgm_uniform")  # at 999, 749, 499 and 249
    never = control(files[0], start_percent=0.3, end_percent=0.4)
    np.testing.assert_array_equal(made(micro_base, config, never), made(micro_base, config))


@pytest.mark.slow
def test_nets_see_what_the_unet_sees_and_rest_outside_their_interval(micro_base: SDXLBase, files: list[Path]) -> None:
    parts = WatchedParts()
    controls = [control(files[0], start_percent=0.2, end_percent=0.7)]
    config = settings(steps=10, scheduler="sgm_uniform", guidance_start=0.3, guidance_end=0.6)
    made(micro_base, config, *controls, parts=parts)
    rows: list[int] = []
    net = next(parts.held(part) for part in parts._held if part.startswith("control_net"))
    net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for count in (1, 2):
        batch = dataclasses.replace(config, count=count, batch_size=count)
        made(micro_base, batch, *controls, parts=parts)
        assert rows == [n * count for n in (1, 2, 2, 2, 1)]  # at 799, then 699, 599 and 499, then 399
        rows.clear()


# Hints


@pytest.mark.slow
def test_each_image_has_its_own_hint_or_all_share_one(micro_base: SDXLBase, files: list[Path]) -> None:
    config = settings(count=2)
    own = control(files[0], hint(1), hint(2))
    images = pixels(micro_base, config, controls=[own])
    for number, image in enumerate(images):
        alone = settings(seed=config.seed + number)
        np.testing.assert_array_equal(image, made(micro_base, alone, control(files[0], own.hints[number])))
    shared = pixels(micro_base, config, controls=[control(files[0], hint(1))])
    np.testing.assert_array_equal(shared[0], images[0])
    assert abs(shared[1] - images[1]).max() > 5
    mixed = [own, control(files[1], hint(3))]
    batched = pixels(micro_base, settings(count=2, batch_size=2), controls=mixed)
    assert abs(batched - pixels(micro_base, config, controls=mixed)).max() <= 1
    with pytest.raises(ValueError, match=r"ControlNet a has 2 images.*3 images are requested.*give 1 for all.*or 3"):
        draw(micro_base, settings(count=3), controls=[own])


def test_hints_are_scaled_to_cover_and_cut_in_the_middle(micro_base: SDXLBase, files: list[Path]) -> None:
    wide = hint(0, 3 * SIDE, 2 * SIDE)
    image = made(micro_base, settings(), control(files[0], wide))
    np.testing.assert_array_equal(image, made(micro_base, settings(), control(files[0], fit_image(wide, SIDE, SIDE))))


@pytest.mark.slow
def test_a_second_pass_is_steered_at_its_own_size(micro_base: SDXLBase, files: list[Path]) -> None:
    large = hint(0, 3 * SIDE, 3 * SIDE)
    steer = control(files[0], large)
    config = settings(hires_scale=1.75, hires_denoise=0.4, hires_steps=2)
    (first,) = draw(micro_base, settings(), controls=[steer])
    second = settings(width=112, height=112, steps=2, denoise=0.4)
    starts = start_images(second, [first.pixels])
    (image,) = draw(micro_base, config, controls=[steer])
    np.testing.assert_array_equal(image.pixels, made(micro_base, second, steer, starts=starts))
    assert abs(image.pixels.astype(int) - made(micro_base, second, starts=starts)).max() > 5
    small = control(files[0], fit_image(large, SIDE, SIDE))  # the same to the first pass
    (other,) = draw(micro_base, config, controls=[small])
    assert key(small) == key(steer) and other.key != image.key


# What enters the key


def key(*controls: Control, numbers: Sequence[int] = (0,), **changes: Any) -> str:
    return str(control_settings(settings(**changes), controls, tuple(numbers)))


@pytest.mark.slow
def test_every_setting_acts_on_pixels_and_key(micro_base: SDXLBase, files: list[Path]) -> None:
    config = settings(steps=6)
    before = control(files[0])
    image = made(micro_base, config, before)
    changed = [
        control(files[1]),
        control(files[0], hint(1)),
        control(files[0], strength=0.5),
        control(files[0], start_percent=0.5),
        control(files[0], end_percent=0.5),
    ]
    for other in changed:
        assert abs(made(micro_base, config, other) - image).max() > 3
    one, two = (control(files[2], control_type=control_type) for control_type in ("depth", CANNY))
    assert abs(made(micro_base, config, one) - made(micro_base, config, two)).max() > 3
    keys = {key(one) for one in (before, *changed, one, two)}
    assert len(keys) == len(changed) + 3


def test_the_key_holds_what_is_used_and_nothing_else(files: list[Path], tmp_path: Path) -> None:
    first, second = control(files[0]), control(files[1])
    assert control_settings(settings(), [], ()) == {}
    assert key(first) == key(control(files[0], hint().copy()))
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(files[0].read_bytes())
    assert key(first) == key(control(renamed))
    wide = hint(0, 3 * SIDE, 2 * SIDE)
    assert key(control(files[0], wide)) == key(control(files[0], fit_image(wide, SIDE, SIDE)))
    assert key(first) != key(first, width=2 * SIDE)
    assert key(first, second, numbers=(0, 0)) != key(second, first, numbers=(0, 0))
    both = control(files[0], hint(), hint(1))
    assert key(both, numbers=[0]) == key(first) != key(both, numbers=[1])
    assert str(files[0].parent) not in key(first)


def test_strength_0_costs_and_changes_nothing(micro_base: SDXLBase, files: list[Path]) -> None:
    parts = WatchedParts()
    (plain,) = draw(micro_base, settings(), parts=parts)
    (off,) = draw(micro_base, settings(), controls=[control(files[0], hint(), hint(1), strength=0)], parts=parts)
    assert off.key == plain.key
    np.testing.assert_array_equal(off.pixels, plain.pixels)
    assert not any("control_net" in event for event in parts.events)


@pytest.mark.slow
def test_images_are_found_again_and_say_who_steered_them(
    micro_base: SDXLBase, files: list[Path], tmp_path: Path
) -> None:
    def run(*controls: Control) -> Any:
        return draw(micro_base, settings(), controls=controls, cache_folder=tmp_path, graph={})

    steer = control(files[0], strength=0.8, end_percent=0.9)
    first = run(steer)
    assert hits(first) == [False] and hits(run(steer)) == [True]
    assert hits(run()) == hits(run(control(files[0], hint(1)))) == [False]
    assert (
        f'ControlNet 0: "Module: none, Model: a [{steer.net.sha256[:10]}], Weight: 0.8, Resize Mode: Crop and Resize, '
        'Guidance Start: 0, Guidance End: 0.9, Control Mode: Balanced"'
    ) in first[0].texts["parameters"]
    both = run(steer, control(files[2], control_type="depth"))
    assert "Control Type: depth, Weight: 1" in both[0].texts["parameters"].partition("ControlNet 1: ")[2]
    assert str(files[0].parent) not in both[0].texts["parameters"]


# What is refused


def test_wrong_settings_are_refused_by_name(micro_base: SDXLBase, files: list[Path]) -> None:
    for changes, message in (
        ({"strength": 11}, "strength is 11: give a value from 0 to 10"),
        ({"strength": -1}, "strength is -1"),
        ({"start_percent": 1.5}, "start_percent is 1.5"),
        ({"end_percent": -0.5}, "end_percent is -0.5"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent is 0.5 and end_percent 0.5: the start must"),
        ({"control_type": "edges"}, "control_type is 'edges': choose one of auto, openpose"),
    ):
        with pytest.raises(ValueError, match=message):
            ControlConfig(**changes)
    with pytest.raises(ValueError, match="control_type is 'depth', but ControlNet a is not a ControlNet-Union"):
        control(files[0], control_type="depth")
    with pytest.raises(ValueError, match="control_type is 'auto', but ControlNet-Union u has openpose,.*choose"):
        control(files[2])
    six = dataclasses.replace(control(files[2], control_type="tile").net, control_types=6)
    with pytest.raises(ValueError, match="control_type is 'tile', but ControlNet-Union u has .*, segment: choose"):
        Control(six, (hint(),), ControlConfig(control_type="tile"))
    with pytest.raises(ValueError, match="ControlNet a has no image: connect one"):
        Control(control(files[0]).net, ())


def test_a_net_that_does_not_fit_is_refused_before_anything_is_loaded(
    micro_base: SDXLBase, files: list[Path], tmp_path: Path
) -> None:
    steer = control(files[0])
    misfit = dataclasses.replace(steer.net, settings={**steer.net.settings, "cross_attention_dim": 2048})
    parts = WatchedParts()
    with pytest.raises(ValueError, match="ControlNet a has text of width 2048, the base micro-sdxl 20"):
        draw(micro_base, settings(), controls=[Control(misfit, steer.hints)], parts=parts)
    assert parts.events == []


# Weights


def moves(parts: WatchedParts) -> list[str]:
    """What happened to the UNet and to ControlNets, without the digits of their files."""
    return [event.partition("_net")[0] for event in parts.taken_events() if event.split()[1] in ("unet", "control_net")]


@pytest.mark.slow
def test_nets_are_loaded_once_and_only_those_of_the_request_are_kept(micro_base: SDXLBase, files: list[Path]) -> None:
    def loads(*controls: Control, **changes: Any) -> list[str]:
        draw(micro_base, settings(**changes), controls=controls, parts=parts)
        return [event for event in moves(parts) if event.startswith("load")]

    parts = WatchedParts()
    a, b = control(files[0]), control(files[1])
    assert loads(a, count=3) == ["load unet", "load control"]
    assert loads(control(files[0], hint(1), strength=0.3, end_percent=0.5)) == []
    assert loads(a, control(files[0], hint(1))) == [], "one file is one net, however often it acts"
    assert loads(a, b) == ["load control"]
    assert loads(b, a) == [] == loads() == loads(b)
    assert len([part for part in parts._held if part.startswith("control_net")]) == 1
    assert loads(a, b) == ["load control"]


@pytest.mark.slow
def test_a_changed_file_is_loaded_anew(micro_base: SDXLBase, tmp_path: Path) -> None:
    parts = WatchedParts()
    path = save_single(tmp_path / "net.safetensors", random_net(micro_base, 1))
    first = made(micro_base, settings(), control(path), parts=parts)
    save_single(path, random_net(micro_base, 7))
    assert abs(made(micro_base, settings(), control(path), parts=parts) - first).max() > 3


@pytest.mark.slow
def test_unet_and_nets_are_on_the_device_together_and_leave_together(micro_base: SDXLBase, files: list[Path]) -> None:
    parts = WatchedParts(offload=True)
    draw(micro_base, settings(steps=1), controls=[control(path) for path in files[:2]], parts=parts)
    assert moves(parts) == [
        "load unet",
        "arrive unet",
        "load control",
        "arrive control",
        "load control",
        "arrive control",
        "leave control",
        "leave control",
        "leave unet",
    ]


@pytest.mark.slow
def test_cancelling_leaves_nothing_behind(micro_base: SDXLBase, files: list[Path]) -> None:
    parts = WatchedParts()
    plain = pixels(micro_base, settings(), parts=parts)
    with pytest.raises(KeyboardInterrupt):
        pixels(micro_base, settings(), controls=[control(files[0])], parts=parts, on_step=cancel_at(2))
    np.testing.assert_array_equal(pixels(micro_base, settings(), parts=parts), plain)


def test_attention_in_slices_is_sliced_in_the_net_too(micro_base: SDXLBase, files: list[Path]) -> None:
    parts = WatchedParts()

    def processors(**changes: Any) -> set[str]:
        made(micro_base, settings(steps=1, **changes), control(files[0]), parts=parts)
        (net,) = (parts.held(part) for part in parts._held if part.startswith("control_net"))
        return {type(processor).__name__ for processor in net.attn_processors.values()}

    assert processors(attention_slicing=True) == {"SlicedAttnProcessor"}
    assert "SlicedAttnProcessor" not in processors()


# The node


@pytest.mark.slow
def test_the_node_adds_a_net_to_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_sdxl: Path, files: list[Path]
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    pack = load_pack()
    nodes, wires = pack.NODE_CLASS_MAPPINGS, pack.nodes.wires
    (tmp_path / "models/controlnet/sub").mkdir(parents=True)
    (tmp_path / "models/diffusers").mkdir(parents=True)
    (tmp_path / "models/diffusers/micro").symlink_to(micro_sdxl)
    for path in files[:2]:
        (tmp_path / "models/controlnet/sub" / path.name).write_bytes(path.read_bytes())
    node = nodes["AddControlNet"]
    assert node.INPUT_TYPES()["required"]["control_net"][0] == ["sub/a.safetensors", "sub/b.safetensors"]
    assert node.VALIDATE_INPUTS(control_net="sub/a.safetensors") is True
    assert "'c' was not found: choose a .safetensors file, or a folder" in node.VALIDATE_INPUTS(control_net="c")
    before = node.IS_CHANGED(control_net="sub/a.safetensors", strength=1.0)
    (tmp_path / "models/controlnet/sub/a.safetensors").touch()
    assert node.IS_CHANGED(control_net="sub/a.safetensors", strength=1.0) != before

    image = wires.to_image([hint(0, 100, 50)])
    first, info = node().add("sub/a.safetensors", image, strength=0.5, start_percent=0.0, end_percent=1.0)["result"]
    assert info.splitlines() == [
        "a: SDXL, ControlNet, 0.00 GB of weights",
        "strength 0.5 from 0% to 100% of the way, by 1 image of 100x50",
    ]
    second, _ = node().add("sub/b.safetensors", image, controls=first, start_percent=0.2)["result"]
    assert [one.net.name for one in second] == ["a", "b"] and len(first) == 1
    assert (second[0].config.strength, second[1].config.start_percent) == (0.5, 0.2)
    np.testing.assert_array_equal(second[0].hints[0], hint(0, 100, 50))
    off, info = node().add("sub/b.safetensors", image, strength=0.0, controls=first)["result"]
    assert off == first and info == "sub/b.safetensors is off"

    (base, _) = nodes["LoadSDXLBase"]().load("micro", "fp32")["result"]
    request = {"prompt": "a red circle", "negative_prompt": "", "seed": 5, "steps": 3, "guidance": 7.0, "cache": "use"}
    size = {"width": SIDE, "height": SIDE, "count": 1, "sampler": "dpmpp_2m", "scheduler": "karras"}
    made = nodes["SDXLGenerateCached"]().generate(base=base, **request, **size, controls=second)["result"][0]
    wanted = draw(base, settings(), controls=second)[0].pixels
    np.testing.assert_array_equal(wires.from_image(made)[0], wanted)
