"""Files of ControlNets: which are taken, in every form, and which are refused by their name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_lora_core.cli.main import main
from sdxl_lora_core.control.control_net import (
    describe_control_net,
    load_control_net,
    load_key,
    open_control_net,
    require_control_net,
    require_fit,
)
from sdxl_lora_core.safetensors_file import WeightsHeader
from sdxl_lora_core.sdxl.base import CONFIGS, SDXLBase, open_base
from sdxl_lora_core.sdxl.detection import read_json
from tests.conftest import sdxl_config
from tests.micro.controls import published_names, random_net, save_single

TINY = Path(__file__).resolve().parents[2] / "assets/tiny-sdxl"


@pytest.fixture(scope="module")
def net(micro_base: SDXLBase) -> Any:
    return random_net(micro_base, seed=1)


@pytest.fixture(scope="module")
def union(micro_base: SDXLBase) -> Any:
    return random_net(micro_base, seed=2, union=True)


def written(net: Any, form: str, folder: Path) -> Path:
    path = folder / f"{form}.safetensors"
    match form:
        case "folder" | "fp16 folder" | "shards":
            size = "100KB" if form == "shards" else "10GB"
            net.save_pretrained(folder / form, variant="fp16" if form.startswith("fp16") else None, max_shard_size=size)
            return folder / form
        case "diffusers' names":
            return save_single(path, net)
        case _:
            prefix = "control_model." if form.startswith("prefixed") else ""
            save_file(published_names(net.state_dict(), prefix), path)
            return path


FORMS = ["folder", "fp16 folder", "shards", "diffusers' names", "published names", "prefixed published names"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_to_the_same_weights(
    micro_base: SDXLBase, net: Any, form: str, tmp_path: Path, no_network: None
) -> None:
    opened = open_control_net(written(net, form, tmp_path))
    require_fit(opened, micro_base)
    loaded: Any = load_control_net(opened, micro_base, torch.float32)
    wanted = net.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.state_dict().items())
    for setting in (
        "attention_head_dim",
        "cross_attention_dim",
        "down_block_types",
        "norm_num_groups",
        "flip_sin_to_cos",
    ):
        assert loaded.config[setting] == net.config[setting]
    assert not any(weight.requires_grad for weight in loaded.parameters()) and not loaded.training
    half: Any = load_control_net(opened, micro_base, torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_published_names_are_those_that_diffusers_renames(net: Any) -> None:
    """diffusers' own renaming takes the test's files for published ones; it knows all but the added embedding."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    renamed = convert_controlnet_checkpoint(published_names(net.state_dict(), "control_model."), net.config)
    wanted = {name: weight for name, weight in net.state_dict().items() if not name.startswith("add_embedding.")}
    assert renamed.keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in renamed.items())


@pytest.mark.parametrize("form", ["folder", "diffusers' names"])
def test_a_union_loads_in_every_form(micro_base: SDXLBase, union: Any, form: str, tmp_path: Path) -> None:
    path = written(union, form, tmp_path)
    if path.is_dir():  # as the first one was published
        config = json.loads((path / "config.json").read_text())
        del config["num_control_type"]
        (path / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetModel_Union"}))
    opened = open_control_net(path)
    assert opened.control_types == 8
    loaded = load_control_net(opened, micro_base, torch.float32)
    assert type(loaded) is type(union)
    wanted = union.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.state_dict().items())
    assert "ControlNet-Union of 8 types" in describe_control_net(opened)


# The full size


def full_size(union: int = 0, **sizes: Any) -> dict[str, Any]:
    """Names and shapes of published ControlNets, on the meta device."""
    import diffusers
    from accelerate import init_empty_weights

    model_class: Any = diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel
    sizes = {**sizes, **({"num_control_type": union} if union else {})}
    settings = sdxl_config(diffusers.UNet2DConditionModel, "unet", {})
    with init_empty_weights():
        net = model_class.from_config({**settings, "conditioning_embedding_out_channels": (16, 32, 96, 256), **sizes})
    return net.state_dict()


SMALL = {
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [0] * 3,
}
FULL_SIZES: dict[str, dict[str, Any]] = {
    "diffusers/controlnet-canny-sdxl-1.0": {},
    "diffusers/controlnet-canny-sdxl-1.0-mid": {"transformer_layers_per_block": [0, 0, 1]},
    "diffusers/controlnet-canny-sdxl-1.0-small": SMALL,
    "xinsir/controlnet-union-sdxl-1.0": {"union": 6},
    "xinsir/controlnet-union-sdxl-1.0 promax": {"union": 8},
}


@pytest.mark.parametrize(
    ("name", "published"),
    [(name, False) for name in FULL_SIZES] + [(name, True) for name in FULL_SIZES if "union" not in name],
)
def test_full_size_headers_are_taken_and_their_layout_is_read(name: str, published: bool) -> None:
    import diffusers
    from accelerate import init_empty_weights

    tensors = full_size(**FULL_SIZES[name])
    named = published_names(tensors) if published else tensors
    header = WeightsHeader(Path("x.safetensors"), {key: tuple(value.shape) for key, value in named.items()}, {})
    layout = require_control_net(header)
    types = layout.get("num_control_type", 0)
    assert types == FULL_SIZES[name].get("union", 0)
    model_class: Any = diffusers.ControlNetUnionModel if types else diffusers.ControlNetModel
    with init_empty_weights():
        made = model_class.from_config({**read_json(CONFIGS / "unet/config.json"), **layout})
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in tensors.items()
    }


# What is refused

CROSS = "transformer_blocks.0.attn2.to_k.weight"
HINT = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "controlnet_down_blocks.0.weight": (320, 320, 1, 1)}
OLD = {"input_hint_block.0.weight": (16, 3, 3, 3), "zero_convs.0.0.weight": (320, 320, 1, 1)}
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "SD 1.5": ({**HINT, f"down_blocks.0.attentions.0.{CROSS}": (320, 768)}, "a Stable Diffusion 1.x ControlNet"),
    "SD 1.5, published": (
        {f"control_model.{name}": shape for name, shape in {**OLD, f"input_blocks.1.1.{CROSS}": (320, 768)}.items()},
        "a Stable Diffusion 1.x ControlNet",
    ),
    "SD 2": ({**OLD, f"input_blocks.1.1.{CROSS}": (320, 1024)}, "a Stable Diffusion 2.x ControlNet"),
    "Kolors": (
        {**HINT, "add_embedding.linear_1.weight": (1280, 5632), "encoder_hid_proj.weight": (2048, 4096)},
        "a Kolors ControlNet",
    ),
    "Flux": (
        {
            "controlnet_blocks.0.weight": (3072, 3072),
            "controlnet_x_embedder.weight": (3072, 64),
            "transformer_blocks.0.attn.to_q.weight": (3072, 3072),
        },
        "a Flux ControlNet",
    ),
    "Flux, XLabs": (
        {
            "controlnet_blocks.0.weight": (3072, 3072),
            "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
            "input_hint_block.0.weight": (16, 3, 3, 3),
        },
        "a Flux ControlNet",
    ),
    "Qwen": (
        {
            "controlnet_blocks.0.weight": (3072, 3072),
            "controlnet_x_embedder.weight": (3072, 64),
            "transformer_blocks.0.img_mlp.net.0.proj.weight": (12288, 3072),
        },
        "a Qwen-Image ControlNet",
    ),
    "SD 3": (
        {
            "controlnet_blocks.0.weight": (1536, 1536),
            "pos_embed_input.proj.weight": (1536, 17, 2, 2),
            "transformer_blocks.0.attn.to_q.weight": (1536, 1536),
        },
        "a Stable Diffusion 3 ControlNet",
    ),
    "T2I-Adapter": (
        {"adapter.conv_in.weight": (320, 768, 3, 3), "adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)},
        "a T2I-Adapter",
    ),
    "T2I-Adapter, published": (
        {"conv_in.weight": (320, 768, 3, 3), "body.0.block1.weight": (320, 320, 3, 3)},
        "a T2I-Adapter",
    ),
    "IP-Adapter": (
        {"image_proj.proj.weight": (8192, 1280), "ip_adapter.1.to_k_ip.weight": (640, 2048)},
        "an IP-Adapter",
    ),
    "IP-Adapter FaceID": (
        {"image_proj.proj.0.weight": (1024, 512), "ip_adapter.0.to_q_lora.down.weight": (128, 640)},
        "an IP-Adapter",
    ),
    "Control-LoRA": (
        {**OLD, "lora_controlnet": (0,), "input_blocks.1.0.in_layers.2.up": (320, 256), "label_emb.0.0.up": (9, 9)},
        "a Control-LoRA",
    ),
    "LLLite": (
        {
            "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight": (16, 3, 4, 4),
            "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (32, 640),
        },
        "a ControlNet-LLLite",
    ),
    "checkpoint": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "first_stage_model.x": (1,),
            "conditioner.embedders.0.transformer.x": (1,),
            "conditioner.embedders.1.model.x": (1,),
        },
        "an SDXL checkpoint",
    ),
    "LoRA": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (8, 640)}, "a LoRA"),
    "UNet": ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "a UNet alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str, tmp_path: Path) -> None:
    shapes, kind = REFUSED[name]
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match=f"other.safetensors is {kind}: use an SDXL ControlNet or ControlNet-Union"):
        open_control_net(path)


def test_damaged_and_incomplete_ones_are_refused(micro_base: SDXLBase, net: Any, tmp_path: Path) -> None:
    def refused(message: str, drop: str = "", **changes: Any) -> None:
        tensors = {name: value for name, value in net.state_dict().items() if name != drop}
        save_file({**tensors, **changes}, tmp_path / "net.safetensors")
        with pytest.raises(ValueError, match=message):
            load_control_net(open_control_net(tmp_path / "net.safetensors"), micro_base, torch.float32)

    refused("net.safetensors looks like an SDXL ControlNet, but lacks the tensor 'conv_in.weight'", "conv_in.weight")
    refused(
        r"the ControlNet in net.safetensors does not fit: 1 tensors.*\(controlnet_mid_block.bias\)",
        "controlnet_mid_block.bias",
    )
    refused(r"does not fit: 1 tensors.*\(more\)", more=torch.zeros(1))
    refused("takes images with 4 channels", **{"controlnet_cond_embedding.conv_in.weight": torch.zeros(16, 4, 3, 3)})
    for name in ("net.pth", "net.bin"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(ValueError, match=f"{name} is a pickle, which is not opened"):
            open_control_net(tmp_path / name)
    net.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(
        FileNotFoundError, match="pickled/ contains only diffusion_pytorch_model.bin, which is a pickle"
    ):
        open_control_net(tmp_path / "pickled")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/config\.json is missing"):
        open_control_net(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="ControlNet gone does not exist: use an SDXL ControlNet"):
        open_control_net(tmp_path / "gone")


def test_a_net_for_another_base_is_refused(net: Any, tmp_path: Path) -> None:
    opened = open_control_net(save_single(tmp_path / "edges.safetensors", net))
    with pytest.raises(ValueError, match=r"edges has blocks of width \[8, 16, 16\], the base tiny-sdxl \[64, 96, 96\]"):
        require_fit(opened, open_base(TINY, "fp32"))


def test_inspect_describes_a_net(net: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net.save_pretrained(tmp_path / "edges")
    main(["inspect", str(tmp_path / "edges")])
    assert capsys.readouterr().out == "edges: SDXL, ControlNet, 0.00 GB of weights\n"


# What a net is by its content


def test_hash_and_key_are_those_of_the_content(micro_base: SDXLBase, net: Any, tmp_path: Path) -> None:
    memo = tmp_path / "memo"
    first = open_control_net(save_single(tmp_path / "a.safetensors", net), memo)
    assert first == open_control_net(save_single(tmp_path / "a.safetensors", net), memo)
    assert first.sha256 == open_control_net(save_single(tmp_path / "b.safetensors", net)).sha256
    other = open_control_net(save_single(tmp_path / "a.safetensors", random_net(micro_base, seed=9)), memo)
    assert first.sha256 != other.sha256
    key = load_key(first, micro_base, torch.float32)
    assert key != load_key(other, micro_base, torch.float32) and key != load_key(first, micro_base, torch.bfloat16)
    net.save_pretrained(tmp_path / "folder")
    folder = open_control_net(tmp_path / "folder", memo)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    (tmp_path / "folder/config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    assert open_control_net(tmp_path / "folder", memo).sha256 == folder.sha256
    (tmp_path / "folder/config.json").write_text(json.dumps({**config, "controlnet_conditioning_channel_order": "bgr"}))
    assert open_control_net(tmp_path / "folder", memo).sha256 != folder.sha256
