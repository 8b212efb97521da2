"""Writes a LoRA's tensors with the keys of kohya, peft or ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..sdxl.family import Part
from ..sdxl.unet_names import sai_block_name
from ..text.embedding_files import bundled_key
from .config import FileFormat
from .modules import DiffModule, LoRAFile, LoRAModule

_KOHYA_PREFIXES: dict[Part, str] = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_COMFYUI_PREFIXES: dict[Part, str] = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}


def state_dict(file: LoRAFile, dtype: torch.dtype, format: FileFormat) -> dict[str, Tensor]:
    """The file's tensors in a format. Raises ValueError for a change that the format cannot represent."""
    writers: Mapping[FileFormat, Callable[[LoRAFile, torch.dtype], dict[str, Tensor]]] = {
        "kohya": kohya_state_dict,
        "peft": peft_state_dict,
        "comfyui": comfyui_state_dict,
    }
    return writers[format](file, dtype)


def kohya_state_dict(file: LoRAFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """Kohya's keys with SAI's block names; ComfyUI, A1111 and diffusers read them. alpha and dora_scale stay fp32.

    Raises ValueError for a DoRA with magnitude: use with_dora_scale first.
    """
    return _with_alpha(file, dtype, lambda part, path: _KOHYA_PREFIXES[part] + path.replace(".", "_"))


def comfyui_state_dict(file: LoRAFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """As kohya_state_dict, with the names of ComfyUI's modules, as its node Extract and Save Lora writes them."""
    return _with_alpha(file, dtype, lambda part, path: _COMFYUI_PREFIXES[part] + path)


def _with_alpha(file: LoRAFile, dtype: torch.dtype, key_of: Callable[[Part, str], str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, modules in file.parts().items():
        for path, module in modules.items():
            owner = path.removesuffix(".bias")
            key = key_of(part, sai_block_name(owner) if part == "unet" else owner)
            if isinstance(module, DiffModule):
                role = "diff" if owner == path else "diff_b"
                tensors[f"{key}.{role}"] = _stored(module.diff.float() * module.scale, dtype)
                continue
            if isinstance(module, LoRAModule) and module.magnitude is not None:
                raise ValueError(
                    f"{path} is a DoRA in peft's form, which kohya's keys cannot represent: save it as peft"
                )
            for factor, tensor in module.factors.items():
                tensors[f"{key}.{factor}"] = _stored(tensor, dtype)
            tensors[f"{key}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
            if module.dora_scale is not None:
                tensors[f"{key}.dora_scale"] = _stored(module.dora_scale, torch.float32)
    return dict(sorted((tensors | _bundled(file)).items()))


def peft_state_dict(file: LoRAFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """diffusers' keys. They have no alpha, so lora_B is multiplied by the scale alpha / rank.

    Raises ValueError for a LoHa, a LoKr, a full-rank diff or a DoRA with dora_scale, which they cannot represent.
    """
    tensors: dict[str, Tensor] = {}
    for part, modules in file.parts().items():
        for path, module in modules.items():
            key = f"{part}.{path}"
            if not isinstance(module, LoRAModule):
                raise ValueError(f"{path} is a {module.kind}, which diffusers cannot load: save in the kohya format")
            tensors[f"{key}.lora_A.weight"] = _stored(module.down, dtype)
            tensors[f"{key}.lora_B.weight"] = _stored(module.up.float() * module.scale, dtype)
            if module.dora_scale is not None:
                raise ValueError(f"{path} is a DoRA in kohya's form, which peft cannot represent: save it as kohya")
            if module.magnitude is not None:
                norms = module.magnitude.flatten()
                shape = (-1,) if module.down.dim() == 2 else (1, -1, 1, 1)
                tensors[f"{key}.lora_magnitude_vector"] = _stored(norms.reshape(shape), torch.float32)
    return dict(sorted((tensors | _bundled(file)).items()))


def _bundled(file: LoRAFile) -> dict[str, Tensor]:
    return {
        bundled_key(name, part): _stored(rows, torch.float32)
        for name, vectors in file.tokens.items()
        for part, rows in vectors.items()
    }


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
