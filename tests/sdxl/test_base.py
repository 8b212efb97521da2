"""SDXL bases: what is opened, what is refused and how parts load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdxl_lora_core
from sdxl_lora_core.lora.config import SaveBaseConfig
from sdxl_lora_core.lora.merged_base import save_merged_base
from sdxl_lora_core.safetensors_file import read_header
from sdxl_lora_core.sdxl import loading
from sdxl_lora_core.sdxl.base import (
    CONFIGS,
    SDXLBase,
    describe_base,
    load_part,
    load_tokenizers,
    native_side,
    open_base,
    require_vae,
    scheduler_config,
    size_note,
)
from sdxl_lora_core.sdxl.family import PARTS
from sdxl_lora_core.sdxl.loading import save_encoder
from sdxl_lora_core.sdxl.precision import resolve_dtype
from sdxl_lora_core.sdxl.vae_override import with_vae
from tests.micro.images import draw, pixels, settings

UNET = "model.diffusion_model."
CPU = torch.device("cpu")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save(path: Path, *names: str, **shapes: tuple[int, ...]) -> Path:
    save_file({name: torch.zeros(shapes.get(name, (2, 2))) for name in names}, path)
    return path


# ------------------------------------------------------------------ data/


def test_data_describes_sdxl_exactly(empty_sdxl: dict[str, Any]) -> None:
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in empty_sdxl.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert empty_sdxl["vae"].config.scaling_factor == 0.13025
    assert empty_sdxl["text_encoder"].config.hidden_act == "quick_gelu"
    assert empty_sdxl["text_encoder_2"].config.hidden_act == "gelu"


def test_tokenizers_are_clips(micro_base: SDXLBase, no_network: None) -> None:
    first, second = load_tokenizers(micro_base)
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("Café, l'été: 42 \U0001f431").input_ids == second("Café, l'été: 42 \U0001f431").input_ids
    assert first("a", padding="max_length").input_ids == [49406, 320] + [49407] * 75
    assert second("a", padding="max_length").input_ids == [49406, 320, 49407] + [0] * 74
    assert first.decode(first("two red squares").input_ids, skip_special_tokens=True) == "two red squares"


# ------------------------------------------------------------------ diffusers folders


def test_a_folder_opens_and_every_part_is_bit_exact(micro_sdxl: Path, micro_base: SDXLBase, no_network: None) -> None:
    assert (micro_base.layout, micro_base.name) == ("diffusers", "micro-sdxl")
    assert (micro_base.prediction_type, micro_base.zero_terminal_snr) == ("epsilon", False)
    for part in PARTS:
        module = load_part(micro_base, part, torch.float32)
        (file,) = (micro_sdxl / part).glob("*.safetensors")
        stored, loaded = load_file(file), module.state_dict()
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(stored[name], loaded[name]) for name in stored)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_parts_load_in_the_dtype_asked_for(micro_base: SDXLBase, micro_sdxl: Path) -> None:
    stored = load_file(micro_sdxl / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = load_part(micro_base, "unet", torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], stored[name].bfloat16()) for name in stored)
    with pytest.raises(ValueError, match="part is 'clip'"):
        load_part(micro_base, "clip", torch.float32)  # type: ignore[arg-type]


def test_an_fp16_variant_and_shards_are_found(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    for part in PARTS:
        (file,) = (folder / part).glob("*.safetensors")
        half = {name: value.half() for name, value in load_file(file).items()}
        save_file(half, file.with_name(file.stem + ".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    base = open_base(folder)
    for part in PARTS:
        assert next(load_part(base, part, torch.float16).parameters()).dtype == torch.float16

    sharded = micro_copy()
    unet: Any = load_part(open_base(sharded), "unet", torch.float32)
    (sharded / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(sharded / "unet", max_shard_size="200KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 2
    again = load_part(open_base(sharded), "unet", torch.float32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in unet.state_dict().items())


def test_a_folder_with_the_older_text_encoder_names_loads(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    before = load_part(open_base(folder), "text_encoder", torch.float32).state_dict()
    file = folder / "text_encoder" / "model.safetensors"
    older = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    older["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # transformers before 4.31 saved it
    save_file(older, file, {"format": "pt"})
    after = load_part(open_base(folder), "text_encoder", torch.float32).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionPipeline"), "StableDiffusionPipeline"),
        (lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline"),
        (lambda f: edit_json(f / "model_index.json", text_encoder=[None, None]), "nothing as its text_encoder"),
        (lambda f: edit_json(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]), "AutoencoderTiny"),
        (lambda f: edit_json(f / "unet" / "config.json", in_channels=9), "inpainting"),
        (lambda f: edit_json(f / "unet" / "config.json", cross_attention_dim=768), "width 768"),
        (lambda f: edit_json(f / "vae" / "config.json", latents_mean=[0.0] * 4), "Playground"),
        (lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="sample"), "'sample'"),
        (lambda f: edit_json(f / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler"), "EDM"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "unet/config.json is not JSON"),
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    ],
)
def test_folders_of_anything_else_are_refused(
    micro_copy: Callable[[], Path], break_it: Callable[[Path], object], message: str
) -> None:
    folder = micro_copy()
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        open_base(folder)


def test_incomplete_folders_are_refused(micro_copy: Callable[[], Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: use an SDXL base"):
        open_base(tmp_path / "nothing")
    folder = micro_copy()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="unet/ contains only diffusion_pytorch_model.bin, which is a pickle"):
        open_base(folder)
    folder = micro_copy()
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        open_base(folder)


def test_a_part_that_lacks_tensors_is_refused_not_made_up(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    for part, name in (("unet", "conv_in.weight"), ("text_encoder", "embeddings.token_embedding.weight")):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        tensors.pop(name if name in tensors else f"text_model.{name}")
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=name):
            load_part(open_base(folder), part, torch.float32)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_reading_holds_no_file_beside_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({f"unet.{number}": torch.zeros(2**18) for number in range(256)}, path)
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from sdxl_lora_core.sdxl.loading import read_tensors\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tensors = read_tensors(Path(sys.argv[1]), 'unet.', torch.float32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    root = Path(sdxl_lora_core.__file__).parents[1]
    command = [sys.executable, "-c", code, str(path)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 1.4 * path.stat().st_size


def test_loading_a_part_draws_no_random_numbers(micro_base: SDXLBase) -> None:
    before = torch.get_rng_state()
    for part in PARTS:
        load_part(micro_base, part, torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_a_unet_of_another_shape_is_refused(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    (file,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "conv_in.bias": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the unet in .* does not fit: 1 tensors .*conv_in.bias"):
        load_part(open_base(folder), "unet", torch.float32)


def test_encoders_written_by_any_transformers_are_read_and_ours_can_be_read_by_any(
    micro_copy: Callable[[], Path], micro_base: SDXLBase
) -> None:
    """From 5.6 on transformers leaves text_model out of the names; older ones need it."""
    for part in ("text_encoder", "text_encoder_2"):
        wanted = load_part(micro_base, part, torch.float32).state_dict()
        folder = micro_copy()
        save_encoder(load_part(micro_base, part, torch.float32), folder / part)
        (file,) = (folder / part).glob("*.safetensors")
        older = load_file(file)
        assert all(name.startswith(("text_model.", "text_projection.")) for name in older)
        for tensors in (older, {name.removeprefix("text_model."): tensor for name, tensor in older.items()}):
            save_file(tensors, file, {"format": "pt"})
            found = load_part(open_base(folder), part, torch.float32).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# ------------------------------------------------------------------ single files


@pytest.mark.slow
def test_a_single_file_is_bit_exact_in_all_parts(
    micro_checkpoint: Path, micro_sdxl: Path, micro_base: SDXLBase, no_network: None
) -> None:
    base = open_base(micro_checkpoint, configs=micro_sdxl)
    assert (base.layout, base.name, base.prediction_type) == ("single_file", "micro-single", "epsilon")
    for part in PARTS:
        wanted, found = (load_part(source, part, torch.float32) for source in (micro_base, base))
        assert type(wanted) is type(found)
        names, weights = wanted.state_dict(), found.state_dict()
        assert names.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in names.items())
        assert not any(parameter.requires_grad for parameter in found.parameters())
    with torch.no_grad():
        tokens = torch.tensor([[49406, 320, 2368, 49407]])
        expected, actual = (load_part(b, "text_encoder_2", torch.float32)(tokens) for b in (micro_base, base))
    assert torch.equal(expected.text_embeds, actual.text_embeds)


def test_only_the_parts_own_tensors_are_read(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(micro_tensors, path)
    base = open_base(path, configs=micro_sdxl)
    path.unlink()
    save_file({name: value for name, value in micro_tensors.items() if name.startswith(UNET)}, path)
    load_part(base, "unet", torch.float16)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        with pytest.raises(ValueError, match=f"the {part} in model.safetensors does not fit"):
            load_part(base, part, torch.float16)


@pytest.mark.parametrize(
    ("markers", "metadata", "expected"),
    [
        ((), {}, ("epsilon", False)),
        (("v_pred",), {}, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
        ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
def test_the_prediction_type_is_detected(
    micro_tensors: dict[str, Tensor],
    micro_sdxl: Path,
    tmp_path: Path,
    markers: tuple[str, ...],
    metadata: dict[str, str],
    expected: tuple[str, bool],
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({**micro_tensors, **{name: torch.tensor([]) for name in markers}}, path, metadata or None)
    base = open_base(path, configs=micro_sdxl)
    assert (base.prediction_type, base.zero_terminal_snr) == expected
    settings = scheduler_config(base)
    assert (settings["prediction_type"], settings["rescale_betas_zero_snr"]) == expected
    assert settings["timestep_spacing"] == ("trailing" if expected[1] else "leading")
    assert (settings["beta_start"], settings["beta_end"], settings["beta_schedule"]) == (
        0.00085,
        0.012,
        "scaled_linear",
    )


def test_a_folders_scheduler_says_the_prediction_type(micro_copy: Callable[[], Path], micro_base: SDXLBase) -> None:
    folder = micro_copy()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    edit_json(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    base = open_base(folder)
    assert (base.prediction_type, base.zero_terminal_snr) == ("v_prediction", True)
    assert base.fingerprint != micro_base.fingerprint


def test_images_far_above_the_native_size_are_noted(micro_base: SDXLBase) -> None:
    tiny = open_base(Path(__file__).parents[2] / "assets/tiny-sdxl")
    assert native_side(tiny) == 128 and "128 x 128 pixels\n" in describe_base(tiny)
    assert size_note(tiny, 256, "resolution") == ""
    assert size_note(tiny, 257, "resolution") == (
        "tiny-sdxl is for images of 128 x 128 pixels: 257 takes long and will not look right. Set resolution to 128."
    )
    assert native_side(replace(micro_base, configs=CONFIGS)) == 1024  # of a single file


def test_what_the_file_does_not_say_can_be_said(micro_sdxl: Path, micro_base: SDXLBase) -> None:
    said = open_base(micro_sdxl, "fp32", prediction="v_prediction", zero_terminal_snr="on")
    assert said == replace(micro_base, prediction_type="v_prediction", zero_terminal_snr=True)
    settings = scheduler_config(said)
    assert (settings["prediction_type"], settings["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert "v_prediction prediction, zero terminal SNR" in describe_base(said)
    assert open_base(micro_sdxl, "fp32", prediction="epsilon", zero_terminal_snr="off") == micro_base
    for name, wrong in (("prediction", "v"), ("zero_terminal_snr", True)):
        with pytest.raises(ValueError, match=f"{name} is {wrong!r}: choose one of auto, "):
            open_base(micro_sdxl, **{name: wrong})  # type: ignore[arg-type]


SDXL = (f"{UNET}input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ((f"{UNET}input_blocks.0.0.weight", "cond_stage_model.transformer.x", "first_stage_model.x"), "Diffusion 1.x"),
        ((f"{UNET}input_blocks.0.0.weight", "cond_stage_model.model.x", "first_stage_model.x"), "Diffusion 2.x"),
        ((f"{UNET}joint_blocks.0.x",), "Stable Diffusion 3"),
        ((f"{UNET}double_blocks.0.x",), "a Flux checkpoint"),
        (("double_blocks.0.x", "single_blocks.0.x"), "a Flux transformer"),
        ((f"{UNET}input_blocks.0.0.weight", "conditioner.embedders.0.model.x", "first_stage_model.x"), "SDXL refiner"),
        (("first_stage_model.encoder.x",), "a VAE alone"),
        (("encoder.conv_in.weight", "decoder.conv_in.weight"), "a VAE alone"),
        (("down_blocks.0.x",), "a UNet alone"),
        (("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"), "a LoRA"),
        (("something.else",), "unknown content .its first tensors: something.else"),
    ],
)
def test_other_checkpoints_are_named(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", *names)
    with pytest.raises(ValueError, match=f"model.safetensors is .*{kind}.*: use an SDXL base"):
        open_base(path)


def test_relatives_of_sdxl_are_refused(micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path) -> None:
    def refused(message: str, tensors: dict[str, Tensor]) -> None:
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            open_base(path, configs=micro_sdxl)

    refused("inpainting", {**micro_tensors, f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)})
    refused("Playground", {**micro_tensors, "edm_mean": torch.zeros(4)})
    cut = {name: value for name, value in micro_tensors.items() if "input_blocks.8.1.transformer_blocks.1" not in name}
    refused("has 16 transformer blocks where SDXL has 17, as SSD-1B", cut)
    wide = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    refused("text of width 24", {**micro_tensors, wide: torch.zeros(16, 24)})


def test_stray_keys_do_not_make_a_checkpoint_something_else(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    stray = ("x.alpha", "lora_unet_x.lora_down.weight", "ip_adapter.1.to_k.weight", "lora_controlnet")
    ema = {f"model_ema.{name}": value.clone() for name, value in micro_tensors.items() if "transformer_blocks" in name}
    save_file({**micro_tensors, **ema, **{name: torch.zeros(1) for name in stray}}, path)
    assert open_base(path, configs=micro_sdxl).layout == "single_file"


@pytest.mark.parametrize(
    "name",
    [
        "scaled_fp8",
        f"{UNET}scaled_fp8",
        f"{UNET}input_blocks.4.1.proj_in.scale_weight",
        f"{UNET}input_blocks.4.1.proj_in.weight_scale",
        "first_stage_model.decoder.conv_in.scale_input",
    ],
)
def test_scaled_weights_are_refused_instead_of_read_without_their_scales(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({**micro_tensors, name: torch.ones(1)}, path)
    with pytest.raises(ValueError, match="has quantised weights with scales beside them .*: use the fp16, bf16"):
        open_base(path, configs=micro_sdxl)


def test_scaled_weights_in_a_folder_are_refused(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    (file,) = (folder / "unet").glob("*.safetensors")
    save_file({**load_file(file), "conv_in.weight_scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="has quantised weights"):
        open_base(folder)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", f"{UNET}input_blocks.1.0.extra.weight"),
        ("vae", "first_stage_model.decoder.extra.weight"),
        ("text_encoder", "conditioner.embedders.0.transformer.text_model.extra.weight"),
        ("text_encoder_2", "conditioner.embedders.1.model.extra.weight"),
    ],
)
def test_unknown_tensors_of_a_single_file_are_named(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path, part: Any, name: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({**micro_tensors, name: torch.zeros(1)}, path)
    base = open_base(path, configs=micro_sdxl)
    with pytest.raises(ValueError, match=f"the {part} in model.safetensors does not fit: 1 tensors .*{name}"):
        load_part(base, part, torch.float32)


@pytest.mark.parametrize("lacking", ["", "encoder", "decoder"], ids=["all", "encoder", "decoder"])
def test_a_checkpoint_without_a_whole_vae_needs_a_chosen_one(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, micro_base: SDXLBase, tmp_path: Path, lacking: str
) -> None:
    path = tmp_path / "model.safetensors"
    kept = {name: value for name, value in micro_tensors.items() if f"first_stage_model.{lacking}" not in name}
    save_file(kept, path)
    base = open_base(path, "fp32", configs=micro_sdxl)
    for use in (
        lambda: require_vae(base),
        lambda: load_part(base, "vae", torch.float32),
        lambda: draw(base, settings()),
        lambda: save_merged_base(base, [], SaveBaseConfig(base_name="merged"), tmp_path, lambda name: False),
    ):
        with pytest.raises(
            ValueError, match="model is an SDXL checkpoint without its VAE, or with half of one: choose"
        ):
            use()
    complete = with_vae(base, micro_sdxl / "vae")
    require_vae(complete)
    np.testing.assert_array_equal(pixels(complete, settings()), pixels(micro_base, settings()))
    assert complete.fingerprint not in (base.fingerprint, micro_base.fingerprint)


@pytest.mark.parametrize(
    ("stated", "prediction"), [("eps", "epsilon"), ("V", "v_prediction"), ("v-pred", "v_prediction"), ("", "epsilon")]
)
def test_usual_names_of_prediction_types_are_understood(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path, stated: str, prediction: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(micro_tensors, path, {"modelspec.prediction_type": stated})
    assert open_base(path, configs=micro_sdxl).prediction_type == prediction


def test_an_unknown_prediction_type_does_not_matter_where_one_is_set(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(micro_tensors, path, {"modelspec.prediction_type": "flow"})
    with pytest.raises(ValueError, match="prediction type 'flow'.*set prediction"):
        open_base(path, configs=micro_sdxl)
    assert open_base(path, configs=micro_sdxl, prediction="v_prediction").prediction_type == "v_prediction"


def test_the_marker_of_zero_snr_counts_with_that_of_v_prediction_only(
    micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path
) -> None:
    path, found = tmp_path / "model.safetensors", []
    for markers in (("ztsnr",), ("v_pred", "ztsnr")):
        save_file({**micro_tensors, **{name: torch.zeros(0) for name in markers}}, path)
        base = open_base(path, configs=micro_sdxl)
        found.append((base.prediction_type, base.zero_terminal_snr))
    assert found == [("epsilon", False), ("v_prediction", True)]


@pytest.mark.parametrize("name", ["Img2Img", "ControlNet", "PAG", "ControlNetImg2Img", ""])
def test_pipelines_over_the_same_parts_are_accepted(micro_copy: Callable[[], Path], name: str) -> None:
    folder = micro_copy()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": f"StableDiffusionXL{name}Pipeline"}))
    assert open_base(folder).layout == "diffusers"


def test_a_folder_with_bf16_files_only_is_read(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    for part in PARTS:
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.bf16.safetensors"))
    base = open_base(folder, "fp32")
    assert load_part(base, "unet", torch.float32) and load_part(base, "text_encoder", torch.float32)


def test_a_small_model_is_not_taken_for_the_real_sdxl(micro_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="17 transformer blocks where SDXL has 70"):
        open_base(micro_checkpoint)


def test_pickles_and_damaged_files_are_refused(micro_checkpoint: Path, tmp_path: Path) -> None:
    whole = micro_checkpoint.read_bytes()
    cases: list[tuple[str, bytes, str]] = [
        ("model.ckpt", whole, "a pickle, which is not opened"),
        ("model.pt", b"", "a pickle, which is not opened"),
        ("renamed.safetensors", b"PK\x03\x04" + bytes(100), "a PyTorch pickle, which is not opened"),
        ("old.safetensors", b"\x80\x02}q\x00." + bytes(100), "a Python pickle, which is not opened"),
        ("page.safetensors", b"<!doctype html>" + bytes(100), "a web page instead of the file: download it again"),
        ("answer.safetensors", b'{"error": "Invalid token"}', "a JSON text instead of the file"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run git lfs pull"),
        ("model.safetensors", b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive: unpack it"),
        ("model2.safetensors", b"Rar!\x1a\x07" + bytes(100), "a RAR archive: unpack it"),
        ("cut.safetensors", whole[:-1], "not a complete safetensors file"),
        ("head.safetensors", whole[:500], "not a complete safetensors file"),
        ("empty.safetensors", b"", "not a complete safetensors file"),
        ("huge.safetensors", (10**12).to_bytes(8, "little") + whole[8:], "not a complete safetensors file"),
        ("noise.safetensors", b"\x08" + bytes(7) + b"not json" + bytes(100), "not a complete safetensors file"),
    ]
    for name, content, message in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_base(tmp_path / name)


@pytest.mark.parametrize("first_byte", [0x80, ord("<")])
def test_a_header_length_that_looks_like_another_format_is_none(first_byte: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(first_byte + 256)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert path.read_bytes()[0] == first_byte
    assert read_header(path).shapes == {"a": (1,)}


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["", "x" * 3, "x" * 6])
def test_weights_lie_at_even_addresses_wherever_they_lie_in_the_file(
    micro_copy: Callable[[], Path], micro_tensors: dict[str, Tensor], micro_sdxl: Path, tmp_path: Path, shift: str
) -> None:
    folder, path = micro_copy(), tmp_path / "model.safetensors"
    for part in PARTS:
        (file,) = (folder / part).glob("*.safetensors")
        save_file(load_file(file), file, {"format": "pt", "shift": shift})
    save_file(micro_tensors, path, {"shift": shift})
    for base in (open_base(folder), open_base(path, configs=micro_sdxl)):
        for part in PARTS:
            assert not any(weight.data_ptr() % 64 for weight in load_part(base, part, torch.float32).parameters())


# ------------------------------------------------------------------ identity, dtype, words


def test_the_fingerprint_is_content_only(micro_copy: Callable[[], Path], micro_base: SDXLBase) -> None:
    folder = micro_copy()
    same = open_base(folder, precision="bf16")
    assert (same.fingerprint, same.part_hashes) == (micro_base.fingerprint, micro_base.part_hashes)
    edit_json(folder / "vae" / "config.json", scaling_factor=0.2)
    changed = open_base(folder)
    differing = {part for part, digest in changed.part_hashes if (part, digest) not in micro_base.part_hashes}
    assert differing == {"vae"}
    assert changed.fingerprint != micro_base.fingerprint


def test_hashes_are_remembered(micro_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = tmp_path / "hashes"
    first = open_base(micro_sdxl, hash_memo=memo)
    assert len(list(memo.iterdir())) == len(PARTS)
    monkeypatch.setattr(
        "sdxl_lora_core.files._hash_file", lambda path: "0" * 64 if path.suffix == ".safetensors" else ""
    )
    assert dict(open_base(micro_sdxl, hash_memo=memo).part_hashes)["unet"] == dict(first.part_hashes)["unet"]


def test_dtypes_by_precision_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, mps = torch.device("cuda"), torch.device("mps")
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("bf16", CPU) == torch.bfloat16
    for macos_14, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, answer=macos_14: answer)
        assert resolve_dtype("auto", mps) == dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_dtype("auto", cuda) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_dtype("auto", cuda) == torch.float16
    with pytest.raises(ValueError, match="choose 'fp16'"):
        resolve_dtype("bf16", cuda)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gfx906:sramecc+:xnack-", torch.float16), ("gfx1030", torch.float16), ("gfx1100", torch.bfloat16)],
)
def test_auto_is_not_bf16_on_amd_gpus_that_emulate_it(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert resolve_dtype("auto", torch.device("cuda")) == dtype


def test_fp16_computes_on_the_cpu(micro_base: SDXLBase) -> None:
    dtype = resolve_dtype("fp16", CPU)
    unet = load_part(micro_base, "unet", dtype)
    added = {"text_embeds": torch.zeros(1, 16, dtype=dtype), "time_ids": torch.zeros(1, 6, dtype=dtype)}
    text = torch.zeros(1, 77, 20, dtype=dtype)
    with torch.no_grad():
        out = unet(torch.ones(1, 4, 8, 8, dtype=dtype), 500, text, added_cond_kwargs=added).sample
    assert out.dtype == torch.float16
    assert out.isfinite().all()


def test_an_unknown_precision_is_refused(micro_sdxl: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'fp8': choose one of auto, bf16"):
        open_base(micro_sdxl, precision="fp8")  # type: ignore[arg-type]


def test_the_description_says_what_it_is(micro_base: SDXLBase, micro_checkpoint: Path, micro_sdxl: Path) -> None:
    assert "micro-sdxl: SDXL, diffusers folder" in describe_base(micro_base)
    assert micro_base.fingerprint in describe_base(micro_base)
    assert "single-file checkpoint" in describe_base(open_base(micro_checkpoint, configs=micro_sdxl))


def test_loading_is_silent_and_leaves_the_libraries_talkative(
    micro_base: SDXLBase,
    micro_checkpoint: Path,
    micro_sdxl: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = diffusers_log.get_verbosity(), transformers_log.get_verbosity(), transformers_log.is_progress_bar_enabled()
    capsys.readouterr()
    for base in (micro_base, open_base(micro_checkpoint, configs=micro_sdxl)):
        for part in PARTS:
            load_part(base, part, torch.float16)
    after = diffusers_log.get_verbosity(), transformers_log.get_verbosity(), transformers_log.is_progress_bar_enabled()
    assert after == before
    assert caplog.text + "".join(capsys.readouterr()) == ""


@pytest.mark.slow
def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, sdxl_lora_core.sdxl.base, sdxl_lora_core.lora.files; print(sorted(sys.modules))"
    root = Path(sdxl_lora_core.__file__).parents[1]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    for heavy in ("diffusers", "transformers", "peft", "accelerate", "pydantic", "matplotlib"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize(
    "cause",
    [
        ImportError("no accelerate"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_a_lack_of_memory_is_no_damaged_model(
    micro_base: SDXLBase, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise cause

    monkeypatch.setattr(loading, "_unet", fail)
    with pytest.raises(type(cause)) as caught:
        load_part(micro_base, "unet", torch.float32)
    assert caught.value is cause


@pytest.mark.parametrize(("entry", "found"), [("abc", "nothing"), ([1, 2, 3], "nothing"), (["diffusers", "X"], "X")])
def test_an_odd_model_index_is_named(micro_copy: Callable[[], Path], entry: Any, found: str) -> None:
    folder = micro_copy()
    edit_json(folder / "model_index.json", unet=entry)
    with pytest.raises(ValueError, match=f"has {found} as its unet, not UNet2DConditionModel"):
        open_base(folder)


@pytest.mark.parametrize("channels", ["4", None, [4]])
def test_an_odd_number_of_channels_is_named(micro_copy: Callable[[], Path], channels: Any) -> None:
    folder = micro_copy()
    edit_json(folder / "unet" / "config.json", in_channels=channels)
    with pytest.raises(ValueError, match="has settings that are not those of SDXL .TypeError: in_channels is"):
        open_base(folder)


def test_numbers_that_json_has_not_are_none(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    edit_json(folder / "scheduler" / "scheduler_config.json", sigma_max=float("inf"))
    assert scheduler_config(open_base(folder))["sigma_max"] is None
