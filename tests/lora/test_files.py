"""LoRA files: spellings, what is refused, what is written, and the same effect in diffusers."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, CaptionEntry
from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.lora.metadata import trigger_words
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.writing import kohya_state_dict, peft_state_dict
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.sdxl.unet_names import sai_block_name
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.lora_metadata import lora_metadata
from sdxl_lora_core.training.model.adapters import TARGETS, Adapter
from tests.micro.loras import (
    ATTENTION,
    CONV,
    OUT,
    TEXT,
    UNET_MODULES,
    Q,
    change,
    load_parts,
    random_lora,
    same_effect,
    some_modules,
)


@pytest.fixture
def parts(micro_base: SDXLBase) -> dict[str, Any]:
    return load_parts(micro_base)


@pytest.fixture
def lora(parts: dict[str, Any]) -> LoRAFile:
    return some_modules(parts)


# ------------------------------------------------------------------ spellings


def spelled(modules: dict[str, LoRAModule], name: Callable[[str], str], down: str, up: str) -> dict[str, Tensor]:
    tensors = {}
    for path, module in modules.items():
        tensors[name(path) + down] = module.down
        tensors[name(path) + up] = module.up * (module.alpha / module.rank)
    return tensors


def flat(path: str) -> str:
    return path.replace(".", "_")


def of_2023(path: str) -> str:
    head, _, leaf = path.rpartition(".to_")
    return f"unet.{head}.processor.to_{leaf.removesuffix('.0')}" if head else f"unet.{path}"


SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (lambda p: "lora_unet_" + flat(sai_block_name(p)), ".lora_down.weight", ".lora_up.weight"),
    "kohya, diffusers names": (lambda p: "lora_unet_" + flat(p), ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (lambda p: f"unet.{p}", ".lora_A.weight", ".lora_B.weight"),
    "named adapter": (lambda p: f"unet.{p}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft": (lambda p: f"base_model.model.{p}", ".lora_A.weight", ".lora_B.weight"),
    "wrapped": (lambda p: f"unet.base_model.model.{p}", ".lora_A.weight", ".lora_B.weight"),
    "early diffusers": (lambda p: f"unet.{p}", ".lora.down.weight", ".lora.up.weight"),
    "processors": (of_2023, "_lora.down.weight", "_lora.up.weight"),
    "bare": (lambda p: p, ".lora_A.weight", ".lora_B.weight"),
    "comfyui": (lambda p: "diffusion_model." + sai_block_name(p), ".lora_down.weight", ".lora_up.weight"),
    "comfyui, peft": (lambda p: "diffusion_model." + sai_block_name(p), ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_the_same(spelling: str, lora: LoRAFile, tmp_path: Path) -> None:
    save_file(spelled(lora.unet, *SPELLINGS[spelling]), tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors")
    assert read.unknown == ()
    assert same_effect(read.unet, lora.unet)


@pytest.mark.parametrize(
    ("first", "second", "down", "up"),
    [
        ("lora_te1_{flat}", "lora_te2_{flat}", ".lora_down.weight", ".lora_up.weight"),
        ("text_encoder.{path}", "text_encoder_2.{path}", ".lora_A.weight", ".lora_B.weight"),
        ("text_encoder.{bare}", "text_encoder_2.{path}", ".lora_A.weight", ".lora_B.weight"),
        (
            "text_encoder.{path}",
            "text_encoder_2.{path}",
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
        (
            "text_encoders.clip_l.transformer.{path}",
            "text_encoders.clip_g.transformer.{path}",
            ".lora_down.weight",
            ".lora_up.weight",
        ),
    ],
)
def test_every_spelling_of_text_encoders_reads_the_same(
    first: str, second: str, down: str, up: str, lora: LoRAFile, tmp_path: Path
) -> None:
    def spell(form: str) -> Callable[[str], str]:
        return lambda path: form.format(path=path, flat=flat(path), bare=path.removeprefix("text_model."))

    tensors = spelled(lora.text_encoder, spell(first), down, up) | spelled(lora.text_encoder_2, spell(second), down, up)
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors")
    assert same_effect(read.text_encoder, lora.text_encoder)
    assert same_effect(read.text_encoder_2, lora.text_encoder_2)
    assert read.unet == {}


def test_alpha_comes_from_its_key_or_from_pefts_settings(tmp_path: Path) -> None:
    pair = {f"unet.{Q}.lora_A.weight": torch.ones(4, 2), f"unet.{Q}.lora_B.weight": torch.ones(2, 4)}
    other = {f"unet.{OUT}.lora_A.weight": torch.ones(4, 2), f"unet.{OUT}.lora_B.weight": torch.ones(2, 4)}

    def alphas(settings: dict[str, Any] | None = None, **more: Tensor) -> tuple[float, float]:
        metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
        save_file({**pair, **other, **more}, tmp_path / "x.safetensors", metadata)
        unet = read_lora(tmp_path / "x.safetensors").unet
        return unet[Q].alpha, unet[OUT].alpha

    assert alphas() == (4.0, 4.0)
    assert alphas(**{f"unet.{Q}.alpha": torch.tensor(2.0)}) == (2.0, 4.0)
    assert alphas({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 1}) == (8.0, 8.0)
    assert alphas({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_out.0": 1}}) == (8.0, 1.0)
    assert alphas({"unet.lora_alpha": 8, "unet.use_rslora": True}) == (16.0, 16.0)

    save_file(
        {f"base_model.model.{key[5:]}": value for key, value in pair.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    assert read_lora(tmp_path / "adapter_model.safetensors").unet[Q].alpha == 12.0


def test_shapes_are_brought_to_the_modules_own(tmp_path: Path) -> None:
    key, conv = f"lora_unet_{flat(sai_block_name(Q))}", f"lora_unet_{flat(sai_block_name(CONV))}"
    tensors = {
        f"{key}.lora_down.weight": torch.randn(2, 6, 1, 1),
        f"{key}.lora_up.weight": torch.randn(5, 2, 1, 1),
        f"{conv}.lora_down.weight": torch.randn(2, 6, 1, 1),
        f"{conv}.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{conv}.lora_up.weight": torch.randn(5, 2, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    unet = read_lora(tmp_path / "x.safetensors").unet
    assert unet[Q].shape == (5, 6)
    assert unet[CONV].shape == (5, 6, 3, 3)
    x = torch.randn(1, 6, 7, 7)
    thin = nn.functional.conv2d(x, tensors[f"{conv}.lora_down.weight"])
    thin = nn.functional.conv2d(thin, tensors[f"{conv}.lora_mid.weight"])
    expected = nn.functional.conv2d(thin, tensors[f"{conv}.lora_up.weight"])
    kernel = change(unet[CONV]).reshape(5, 6, 3, 3)
    assert torch.allclose(nn.functional.conv2d(x, kernel), expected, atol=1e-5)


def test_what_is_not_low_rank_is_named(lora: LoRAFile, tmp_path: Path) -> None:
    extra = {
        "lora_unet_input_blocks_4_1_proj_in.hada_w1_a": torch.ones(2, 2),
        "lora_unet_out_2.set_weight": torch.ones(2, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2),
        "lora_unet_input_blocks_5_1_proj_in.lora_down.weight": torch.ones(2, 2),
    }
    save_file({**kohya_state_dict(lora, torch.float32), **extra}, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors")
    assert read.unknown == (
        "lora_unet_nowhere.lora_down.weight",
        "lora_unet_out_2.set_weight",
        "unet.down_blocks.1.attentions.0.proj_in (hada_w1_a alone)",
        "unet.down_blocks.1.attentions.1.proj_in (down alone)",
    )
    assert same_effect(read.unet, lora.unet)
    told = describe_lora(tmp_path / "x.safetensors")
    found = 3 * (len(lora.unet) + len(lora.text_encoder) + len(lora.text_encoder_2)) + 4
    assert f"{found - 4} of {found} keys are applied" in told
    assert "4 keys are unknown: lora_unet_nowhere.lora_down.weight" in told


# ------------------------------------------------------------------ refusals


def low_rank(name: str, width: int = 640) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(8, 2)}


ATTN2 = "transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (low_rank("lora_unet_down_blocks_1_attentions_0_" + ATTN2, 768), "a Stable Diffusion 1.x LoRA"),
        (low_rank("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"), "a Stable Diffusion 1.x LoRA"),
        ({f"lora_unet_mid_block_attentions_0_{ATTN2}.hada_w1_b": torch.ones(2, 768)}, "a Stable Diffusion 1.x LoRA"),
        (low_rank("lora_te_text_model_encoder_layers_0_mlp_fc1"), "a Stable Diffusion 1.x LoRA"),
        (low_rank("unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"), "a Stable Diffusion 1.x LoRA"),
        (low_rank("lora_unet_mid_block_attentions_0_" + ATTN2, 1024), "a Stable Diffusion 2.x LoRA"),
        (low_rank("lora_unet_middle_block_1_" + ATTN2, 1280), "an SDXL refiner LoRA"),
        (low_rank("lora_unet_double_blocks_0_img_attn_qkv"), "a Flux or HunyuanVideo LoRA"),
        (low_rank("transformer.single_transformer_blocks.0.attn.to_q"), "a Flux or HunyuanVideo LoRA"),
        (low_rank("lora_unet_joint_blocks_0_x_block_attn_qkv"), "a Stable Diffusion 3 LoRA"),
        (low_rank("transformer.transformer_blocks.0.attn.to_q"), "a Stable Diffusion 3 LoRA"),
        (low_rank("diffusion_model.blocks.0.self_attn.q"), "a LoRA of a video or image transformer"),
        ({"first_stage_model.encoder.x": torch.ones(2)}, "a VAE alone"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3)}, "a diffusion model without"),
        ({"clip_g": torch.ones(2, 1280), "clip_l": torch.ones(2, 768)}, "a file of unknown content"),
    ],
)
def test_loras_of_other_models_are_named(tensors: dict[str, Tensor], kind: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"other.safetensors is {kind}.*: use an SDXL LoRA"):
        read_lora(tmp_path / "other.safetensors")


def test_damaged_and_empty_loras_are_refused(lora: LoRAFile, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    key = f"unet.{Q}"
    for tensors, message in (
        ({f"{key}.oft_blocks": torch.ones(2, 2)}, "is an OFT or BOFT, which this pack cannot apply"),
        ({f"{key}.a1.weight": torch.ones(2, 2), f"{key}.b2.weight": torch.ones(2, 2)}, "is a GLoRA, which"),
        ({f"{key}.on_input": torch.ones(1), f"{key}.weight": torch.ones(2)}, r"is an \(IA\)3, which"),
        ({f"{key}.diff_x": torch.ones(2)}, "is a file of unknown content|no low-rank change"),
        ({f"{key}.lora_A.weight": torch.ones(0, 2), f"{key}.lora_B.weight": torch.ones(2, 0)}, r"of shape \[0, 2\]"),
        (
            {
                f"{key}.lora_A.weight": torch.ones(4, 2),
                f"{key}.lora_B.weight": torch.ones(2, 4),
                f"{key}.alpha": torch.ones(2),
            },
            r"has alpha of shape \[2\]: damaged file",
        ),
        ({f"{key}.lora_A.weight": torch.ones(4, 2), f"{key}.lora_B.weight": torch.ones(2, 3)}, "of different ranks"),
        (
            {f"{key}.lora_A.weight": torch.full((4, 2), math.nan), f"{key}.lora_B.weight": torch.ones(2, 4)},
            "contains NaN",
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            read_lora(path)
    write_lora(path, lora, torch.float16)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_lora(path)
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="x.pt is a pickle, which is not opened"):
        read_lora(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="nothing.safetensors is not a file"):
        read_lora(tmp_path / "nothing.safetensors")


# ------------------------------------------------------------------ writing


def test_kohya_to_peft_and_back_keeps_the_effect(lora: LoRAFile, tmp_path: Path) -> None:
    write_lora(tmp_path / "k.safetensors", lora, torch.float32)
    kohya = read_lora(tmp_path / "k.safetensors")
    write_lora(tmp_path / "p.safetensors", kohya, torch.float32, format="peft")
    peft = read_lora(tmp_path / "p.safetensors")
    for part, modules in lora.parts().items():
        assert same_effect(modules, kohya.parts()[part], tolerance=0)
        assert same_effect(modules, peft.parts()[part])
    assert kohya.unet[Q].alpha == 6.0
    assert peft.unet[Q].alpha == peft.unet[Q].rank == 3  # the scale lies in lora_B


def test_the_keys_are_the_ones_others_read(lora: LoRAFile) -> None:
    kohya = kohya_state_dict(lora, torch.float16)
    assert len(kohya) == 3 * (len(UNET_MODULES) + 4)
    assert kohya["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"].dtype == torch.float16
    assert kohya["lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0.alpha"].item() == 6.0
    assert "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in kohya
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in kohya
    peft = peft_state_dict(lora, torch.bfloat16)
    assert peft[f"unet.{Q}.lora_A.weight"].dtype == torch.bfloat16
    assert f"text_encoder_2.{TEXT}.lora_B.weight" in peft
    assert list(kohya) == sorted(kohya)


WRITE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.files import write_lora
names = [f"down_blocks.1.attentions.{i}.proj_in" for i in (0, 1)]
modules = {name: LoRAModule(torch.arange(6.0).reshape(2, 3), torch.ones(3, 2), 1.0) for name in set(names)}
metadata = {f"ss_{letter}": letter for letter in {*"abcdefghijkl"}}
write_lora(Path(sys.argv[1]), LoRAFile(unet=modules, metadata=metadata), torch.float16)
"""


@pytest.mark.slow
def test_equal_content_gives_equal_bytes_in_any_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    names = [f"down_blocks.1.attentions.{i}.proj_in" for i in (1, 0)]
    modules = {name: LoRAModule(torch.arange(6.0).reshape(2, 3), torch.ones(3, 2), 1.0) for name in names}
    file = LoRAFile(unet=modules, metadata={f"ss_{letter}": letter for letter in "lkjihgfedcba"})
    here, elsewhere = tmp_path / "here.safetensors", tmp_path / "elsewhere.safetensors"
    write_lora(here, file, torch.float16)
    subprocess.run([sys.executable, "-c", WRITE, elsewhere], cwd=root, check=True)
    first = here.read_bytes()
    assert first == elsewhere.read_bytes()
    with safe_open(here, framework="pt") as stored:
        metadata = stored.metadata()
    data = first[8 + int.from_bytes(first[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert int.from_bytes(first[:8], "little") % 8 == 0


def metadata_of(base: SDXLBase, trigger_words: tuple[str, ...] = ("8bit",)) -> dict[str, str]:
    model = replace(
        base,
        name="sd_xl_base_1.0",
        fingerprint="ab" * 32,
        prediction_type="v_prediction",
        zero_terminal_snr=True,
    )
    captions = ["8bit, a cat"] * 12 + ["8bit, a dog"] * 12
    entries = tuple(CaptionEntry(Path("cats/1.png"), (text,), 1024, 1024, "", 2, False, 1024) for text in captions)
    dataset = CaptionDataset(entries, (), "", (), trigger_words, "cats")
    job = TrainingJob(model, dataset, TrainConfig(rank=4, alpha=8, seed=7, steps=100))
    return lora_metadata(job, "pixel", 90, torch.bfloat16)


def test_the_metadata_is_what_galleries_read(lora: LoRAFile, micro_base: SDXLBase, tmp_path: Path) -> None:
    metadata = metadata_of(micro_base)
    assert metadata.items() >= {
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("ss_network_module", "networks.lora"),
        ("ss_network_dim", "4"),
        ("ss_network_alpha", "8"),
        ("ss_output_name", "pixel"),
        ("ss_steps", "90"),
        ("ss_seed", "7"),
        ("ss_num_train_images", "48"),
        ("ss_mixed_precision", "bf16"),
        ("ss_v_parameterization", "True"),
        ("modelspec.sai_model_spec", "1.0.0"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
        ("modelspec.prediction_type", "v"),
        ("modelspec.resolution", "1024x1024"),
        ("modelspec.trigger_phrase", "8bit"),
    }
    assert json.loads(metadata["ss_tag_frequency"]) == {"cats": {"8bit": 24, "a cat": 12, "a dog": 12}}
    assert json.loads(metadata["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "8bit"
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata == metadata_of(micro_base)
    assert trigger_words(metadata) == ("8bit",)
    assert trigger_words(metadata_of(micro_base, trigger_words=())) == ()

    lora.metadata = metadata
    write_lora(tmp_path / "x.safetensors", lora, torch.float16)
    assert read_lora(tmp_path / "x.safetensors").metadata.items() >= metadata.items()
    text = describe_lora(tmp_path / "x.safetensors")
    assert "unet: LoRA of 5 modules, rank 3, alpha 6" in text
    assert "trigger words: 8bit" in text
    assert "trained on sd_xl_base_1.0 for 90 steps" in text


# ------------------------------------------------------------------ diffusers


@pytest.fixture
def pipeline(micro_sdxl: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(micro_sdxl, local_files_only=True)


def full_lora(parts: dict[str, Any], **settings: Any) -> LoRAFile:
    """On every attention module of the UNet and every projection of both text encoders."""
    attention = tuple(name for name, _ in parts["unet"].named_modules() if name.endswith(ATTENTION))
    text = {
        part: tuple(
            f"text_model.{name.removeprefix('text_model.')}"
            for name, module in parts[part].named_modules()
            if isinstance(module, nn.Linear) and "layers" in name
        )
        for part in ("text_encoder", "text_encoder_2")
    }
    return LoRAFile(
        unet=random_lora(parts["unet"], attention, **settings),
        text_encoder=random_lora(parts["text_encoder"], text["text_encoder"], **settings),
        text_encoder_2=random_lora(parts["text_encoder_2"], text["text_encoder_2"], **settings),
    )


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_applies_every_key_with_the_same_effect(
    format: Any, parts: dict[str, Any], pipeline: Any, tmp_path: Path
) -> None:
    file = full_lora(parts, rank=4, alpha=8.0)
    write_lora(tmp_path / "x.safetensors", file, torch.float32, format)
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="x")
    loaded = {part: adapter_modules(getattr(pipeline, part)) for part in file.parts()}
    for part, modules in file.parts().items():
        assert loaded[part] == {name.removeprefix("text_model.") for name in modules}
    pipeline.fuse_lora(adapter_names=["x"])
    pipeline.unload_lora_weights()
    for part, modules in file.parts().items():
        report = merge_into(parts[part], modules, 1.0)
        assert len(report.applied) == len(modules)
        ours, theirs = parts[part].state_dict(), getattr(pipeline, part).state_dict()
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=0) for name in ours)


def adapter_modules(part: nn.Module) -> set[str]:
    names = (name for name, module in part.named_modules() if "x" in getattr(module, "lora_A", {}))
    return {name.removeprefix("text_model.") for name in names}


def test_a_file_that_diffusers_wrote_has_its_effect(parts: dict[str, Any], pipeline: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = pipeline.unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    settings = {"r": 2, "lora_alpha": 7, "target_modules": ["to_q", "to_out.0"]}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings, weight_name="x.safetensors"
    )
    read = read_lora(tmp_path / "x.safetensors")
    assert read.unknown == ()
    merge_into(parts["unet"], read.unet, 1.0)
    unet.fuse_lora()
    unet.unload_lora()
    theirs = unet.state_dict()
    assert len(read.unet) == 2 * len([name for name in theirs if name.endswith("attn1.to_q.weight")]) * 2
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in parts["unet"].state_dict().items())


def test_the_written_file_is_plain_safetensors(lora: LoRAFile, tmp_path: Path) -> None:
    write_lora(tmp_path / "x.safetensors", lora, torch.float16)
    loaded = load_file(tmp_path / "x.safetensors")
    expected = kohya_state_dict(lora, torch.float16)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize(("kind", "format"), [("lora", "kohya"), ("lora", "peft"), ("dora", "peft")])
def test_diffusers_loads_a_trained_adapter_whole(
    kind: Any, format: Any, rank_stabilised: bool, micro_base: SDXLBase, pipeline: Any, tmp_path: Path
) -> None:
    """diffusers 0.42 leaves a DoRA's lengths in kohya's keys out, and says so; peft's keys it takes."""
    unet = trained_unet(micro_base, tmp_path, adapter=kind, use_rslora=rank_stabilised, save_format=format)
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="x")
    assert adapter_modules(pipeline.unet) == set(read_lora(tmp_path / "x.safetensors").unet)
    pipeline.fuse_lora(adapter_names=["x"])
    pipeline.unload_lora_weights()
    theirs = pipeline.unet.state_dict()
    assert all(torch.allclose(weight, theirs[name], atol=1e-6, rtol=1e-5) for name, weight in unet.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_loads_a_trained_adapter_whole(kind: Any, micro_base: SDXLBase, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    unet = trained_unet(micro_base, tmp_path, adapter=kind, save_format="peft")
    plain: Any = load_parts(micro_base)["unet"]
    names = [name for name, module in plain.named_modules() if module.__class__ in (nn.Linear, nn.Conv2d)]
    pattern = rf".*\.({'|'.join(TARGETS['all-linear+conv'])})"
    targets = [name for name in names if re.fullmatch(pattern, name)]
    model = get_peft_model(plain, LoraConfig(r=3, lora_alpha=3, use_dora=kind == "dora", target_modules=targets))
    weights = {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in load_file(tmp_path / "x.safetensors").items()
    }
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    theirs = model.merge_and_unload().state_dict()
    assert all(torch.allclose(weight, theirs[name], atol=1e-6, rtol=1e-5) for name, weight in unet.state_dict().items())


def trained_unet(base: SDXLBase, folder: Path, **settings: Any) -> Any:
    """Writes an adapter on every layer to x.safetensors, and returns the UNet with it merged in."""
    unet: Any = load_parts(base)["unet"]
    config = TrainConfig(rank=3, alpha=5.0, target_modules="all-linear+conv", **settings)
    adapter = Adapter(load_parts(base)["unet"], config)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.groups[0].parameters):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    write_lora(folder / "x.safetensors", LoRAFile(unet=adapter.modules()), torch.float32, config.save_format)
    merge_into(unet, adapter.modules(), 1.0)
    return unet
