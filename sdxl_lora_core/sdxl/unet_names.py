"""Two names for each module of SDXL's UNet: diffusers' (`down_blocks.1.attentions.0`) and SAI's (`input_blocks.4.1`).

SAI numbers a UNet's layers consecutively where diffusers groups them in stages: a stage has `layers` pairs of resnet
and attention (one more in the up blocks), then a down- or upsampler. The conversion works on names alone, for every
UNet with SDXL's layout, whatever its widths and depths. Kohya's files write `_` for `.` in either name; `dotted`
reverses that.
"""

from __future__ import annotations

import re

LAYERS = 2  # layers_per_block of SDXL's UNet

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TO_DIFFUSERS = {sai: name for table in (_OUTSIDE_BLOCKS, _MIDDLE, _IN_RESNET) for name, sai in table.items()}

_STAGE = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE_LAYER = re.compile(r"(mid_block\.(?:resnets|attentions)\.\d)\.(.+)")
_SAI_ROW = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)")
_SAI_MIDDLE = re.compile(r"(middle_block\.\d)\.(.+)")

# Every name that contains an underscore in SDXL's UNet (in both namings) and in CLIP's text model.
_COMPOUNDS = (
    "input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "conv_in", "conv_out", "conv_norm_out", "conv_shortcut", "time_emb_proj", "transformer_blocks",
    "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "text_model", "self_attn", "q_proj", "k_proj", "v_proj",
    "out_proj", "text_projection", "token_embedding", "position_embedding", "layer_norm1", "layer_norm2",
    "final_layer_norm",
)  # fmt: skip
_SPLIT_COMPOUND = re.compile(
    r"(?:^|(?<=\.))(" + "|".join(re.escape(word.replace("_", ".")) for word in _COMPOUNDS) + r")(?=\.|$)"
)


def dotted(flat: str) -> str:
    """The module path of a name in kohya's files: `..._attn1_to_out_0` gives `...attn1.to_out.0`."""
    return _SPLIT_COMPOUND.sub(lambda found: found[1].replace(".", "_"), flat.replace("_", "."))


def sai_block_name(path: str, layers: int = LAYERS) -> str:
    """SAI's name of the UNet module at diffusers' `path`. Raises ValueError if there is none."""
    if path in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[path]
    if (found := _MIDDLE_LAYER.fullmatch(path)) and found[1] in _MIDDLE:
        return f"{_MIDDLE[found[1]]}.{_IN_RESNET.get(found[2], found[2])}"
    if found := _STAGE.fullmatch(path):
        way, stage, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        row = stage * (layers + 1) + (layers if kind.endswith("samplers") else index)
        if way == "down":
            return f"input_blocks.{row + 1}.{_inside(kind, rest)}"
        return f"output_blocks.{row}.{_inside(kind, rest)}"
    raise ValueError(f"{path} is not a module of SDXL's UNet")


def diffusers_block_name(name: str, layers: int = LAYERS) -> str | None:
    """The inverse of sai_block_name; None for a name that SAI's UNet does not have."""
    if name in _TO_DIFFUSERS:
        return _TO_DIFFUSERS[name]
    if (found := _SAI_MIDDLE.fullmatch(name)) and found[1] in _TO_DIFFUSERS:
        return f"{_TO_DIFFUSERS[found[1]]}.{_TO_DIFFUSERS.get(found[2], found[2])}"
    if found := _SAI_ROW.fullmatch(name):
        return _in_stage(found[1] == "input", int(found[2]), int(found[3]), found[4], layers)
    return None


def _inside(kind: str, rest: str) -> str:
    """The name within a row of SAI's: 0 is the resnet, 1 the attention, 2 the upsampler; a downsampler has a row."""
    match kind:
        case "resnets":
            return f"0.{_IN_RESNET.get(rest, rest)}"
        case "attentions":
            return f"1.{rest}"
        case "downsamplers":
            return "0.op"
        case _:
            return f"2.{rest}"


def _in_stage(is_down: bool, row: int, slot: int, rest: str, layers: int) -> str | None:
    way = "down" if is_down else "up"
    stage, index = divmod(row - is_down, layers + 1)
    match slot, rest:
        case 0, "op":
            return f"{way}_blocks.{stage}.downsamplers.0.conv"
        case 0, _:
            return f"{way}_blocks.{stage}.resnets.{index}.{_TO_DIFFUSERS.get(rest, rest)}"
        case 1, _:
            return f"{way}_blocks.{stage}.attentions.{index}.{rest}"
        case 2, "conv":
            return f"{way}_blocks.{stage}.upsamplers.0.{rest}"
        case _:
            return None
