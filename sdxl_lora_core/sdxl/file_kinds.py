"""Names the kind of a weights file from its tensors' names and shapes, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..safetensors_file import WeightsHeader, first_names

UNET = "model.diffusion_model."
TEXT_1 = "cond_stage_model.transformer."  # of Stable Diffusion 1
TEXT = "conditioner.embedders.0.transformer."
TEXT_2 = "conditioner.embedders.1.model."
VAE = "first_stage_model."
CONTROL = "control_model."

# Adapters that do not add a low-rank product to a weight, by the ends of their tensors' names.
_OTHER_ADAPTERS = {
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.oft_(blocks|diag|R)": "an OFT or BOFT",
    r"\.on_input$": "an (IA)3",
}
_ADAPTER = re.compile(
    r"[._](lora_|lora\.|hada_|lokr_|oft_)|\.(alpha|dora_scale|diff|diff_b|w_norm|b_norm)$|^bundle_emb\.|"
    + "|".join(_OTHER_ADAPTERS)
)

# The first rule whose prefixes all occur applies.
_CHECKPOINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((UNET + "joint_blocks.",), "a Stable Diffusion 3 checkpoint"),
    ((UNET + "double_blocks.",), "a Flux checkpoint"),
    (("double_blocks.",), "a Flux transformer"),
    (("joint_blocks.",), "a Stable Diffusion 3 transformer"),
    ((TEXT_1,), "a Stable Diffusion 1.x checkpoint"),
    (("cond_stage_model.model.",), "a Stable Diffusion 2.x checkpoint"),
    ((UNET, "conditioner.embedders.0.model."), "an SDXL refiner checkpoint"),
    ((UNET,), "a diffusion model without its text encoders"),
    (("input_blocks.",), "a UNet alone"),
    (("down_blocks.",), "a UNet alone"),
    (("transformer_blocks.",), "a diffusion transformer alone"),
    (("encoder.", "decoder."), "a VAE alone"),
    ((VAE,), "a VAE alone"),
    (("text_model.",), "a text encoder alone"),
    (("vision_model.",), "a CLIP vision model"),
)

# Image-conditioning models. Checked before adapters, because some of their names look like those of adapters.
_STEERING: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_controlnet",), "a Control-LoRA"),
    (("lllite_unet",), "a ControlNet-LLLite"),
    (("ip_adapter.",), "an IP-Adapter"),
    (("image_proj.",), "an IP-Adapter"),
    (("adapter.body.", "adapter.conv_in."), "a T2I-Adapter"),
    (("body.", "conv_in."), "a T2I-Adapter"),
    (("controlnet_blocks.", "double_blocks."), "a Flux ControlNet"),
    (("controlnet_blocks.", "transformer_blocks.0.img_mlp."), "a Qwen-Image ControlNet"),
    (("controlnet_blocks.", "controlnet_x_embedder."), "a Flux ControlNet"),
    (("controlnet_blocks.", "pos_embed_input."), "a Stable Diffusion 3 ControlNet"),
    (("controlnet_blocks.",), "a ControlNet for a diffusion transformer"),
)
_SCALE = re.compile(r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)(_\d)?$")
SDXL_CONTROL_NETS = "an SDXL ControlNet", "an SDXL ControlNet-Union"
_KOLORS_ADDED_WIDTH = 5632

# Stable Diffusion 1 and 2 have attention in the outermost stage, SDXL has not.
_OUTER_ATTENTION = re.compile(
    r"input_blocks[._][12][._]1[._]|output_blocks[._](6|7|8|9|10|11)[._]1[._]"
    r"|down_blocks[._]0[._]attentions|up_blocks[._][23][._]attentions"
)
_CROSS_ATTENTION_INPUT = re.compile(r"attn2[._].*to_[kv].*(lora[._]down|lora_A|lora\.down|hada_w1_b)")
_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "a Flux or HunyuanVideo LoRA"),
    (r"joint_blocks|transformer\.transformer_blocks", "a Stable Diffusion 3 LoRA"),
    (r"^(diffusion_model|lora_unet|transformer)[._](blocks|layers)[._]\d", "a LoRA of a video or image transformer"),
    (r"^(lora_prior|prior)[._]", "a Stable Cascade LoRA"),
)


def kind_of(header: WeightsHeader) -> str:
    """The kind of the file with its article: "a Flux checkpoint", "a LoRA" and so on."""
    if header.has(UNET, TEXT, TEXT_2):  # whatever else is in it, such as a stray key of an adapter
        return "an SDXL checkpoint" if header.has(VAE) else "an SDXL checkpoint without its VAE"
    if header.has(UNET, TEXT_1):
        return "a Stable Diffusion 1.x checkpoint"
    for prefixes, kind in _STEERING:
        if header.has(*prefixes):
            return kind
    if control_net := _control_net(header):
        return control_net
    if is_adapter(header):
        return foreign_adapter(header) or "a LoRA"
    for prefixes, kind in _CHECKPOINTS:
        if header.has(*prefixes):
            return kind
    return f"a file of unknown content (its first tensors: {first_names(header.shapes) or 'none'})"


def _control_net(header: WeightsHeader) -> str | None:
    """The kind of a ControlNet that copies a UNet's down blocks, in diffusers' or the published names; else None."""
    names = {name.removeprefix(CONTROL): shape for name, shape in header.shapes.items()}
    if not any(name.startswith(("controlnet_cond_embedding.", "input_hint_block.")) for name in names):
        return None
    added = names.get("add_embedding.linear_1.weight") or names.get("label_emb.0.0.weight")
    if added:
        if added[-1] == _KOLORS_ADDED_WIDTH:
            return "a Kolors ControlNet"
        return SDXL_CONTROL_NETS["task_embedding" in names]
    widths = {shape[-1] for name, shape in names.items() if name.endswith("attn2.to_k.weight")}
    version = {768: "1.x", 1024: "2.x"}.get(max(widths, default=0))
    return f"a Stable Diffusion {version} ControlNet" if version else "a ControlNet of another architecture"


def require_unscaled(header: WeightsHeader) -> None:
    """Raises ValueError for weights that are stored with scales beside them, such as scaled fp8: w = scale * q."""
    if name := next((name for name in header.shapes if _SCALE.search(name)), None):
        raise ValueError(
            f"{header.path.name} has quantised weights with scales beside them ({name}), which are not read: use the "
            "fp16, bf16 or plain fp8 version of the model"
        )


def is_adapter(header: WeightsHeader) -> bool:
    return any(_ADAPTER.search(name) for name in header.shapes)


def other_adapter(names: Iterable[str]) -> str | None:
    """The kind of unsupported adapter, such as "a GLoRA", that some of the tensors belong to, or None."""
    known = list(names)
    return next((kind for end, kind in _OTHER_ADAPTERS.items() if any(re.search(end, name) for name in known)), None)


def foreign_adapter(header: WeightsHeader) -> str | None:
    """The kind of an adapter for another architecture, or None if it may be for SDXL."""
    for pattern, kind in _ADAPTERS:
        if any(re.search(pattern, name) for name in header.shapes):
            return kind
    inputs = (shape for name, shape in header.shapes.items() if _CROSS_ATTENTION_INPUT.search(name))
    widths = {shape[1] for shape in inputs if len(shape) > 1}
    if 1024 in widths:
        return "a Stable Diffusion 2.x LoRA"
    if 1280 in widths:
        return "an SDXL refiner LoRA"
    old_text_encoder = 2048 not in widths and any(name.startswith("lora_te_") for name in header.shapes)
    if 768 in widths or old_text_encoder or any(_OUTER_ATTENTION.search(name) for name in header.shapes):
        return "a Stable Diffusion 1.x LoRA"
    return None
