"""Reads and writes LoRA files.

In memory a LoRA's modules are named by diffusers' path within their part, whatever the file's key format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..safetensors_file import WeightsHeader, first_names, pack_weights, read_header, write_weights
from ..sdxl.detection import read_json
from ..sdxl.file_kinds import foreign_adapter, is_adapter, kind_of, other_adapter
from .config import FileFormat
from .dialects import SETTINGS_KEY, peft_settings
from .modules import LoRAFile
from .reading import lora_of_tensors
from .writing import state_dict

WANTED = "use an SDXL LoRA (.safetensors)"


def read_lora(path: Path) -> LoRAFile:
    """Reads a LoRA in any of the key formats in dialects.py.

    Raises FileNotFoundError, or ValueError for a file that is not an SDXL LoRA (naming what it is), has no module that
    can be applied, or is damaged.
    """
    header = read_header(path)
    beside = settings_file(path)
    settings = peft_settings(header.metadata) or (read_json(beside) if beside else {})
    _require_sdxl_lora(header)
    with safe_open(path, framework="pt") as weights:
        tensors = ((key, weights.get_tensor(key)) for key in weights.keys())  # noqa: SIM118
        file = lora_of_tensors(path.name, tensors, settings)
    _require_something(path.name, file)
    # peft's settings are part of the modules' alphas now, and would be wrong beside them.
    file.metadata = {key: value for key, value in header.metadata.items() if key != SETTINGS_KEY}
    return file


def lora_of_state_dict(name: str, tensors: Mapping[str, Tensor]) -> LoRAFile:
    """As read_lora, for tensors in memory such as ComfyUI's LORA_MODEL. `name` is for messages."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    _require_sdxl_lora(WeightsHeader(Path(name), shapes, {}))
    file = lora_of_tensors(name, tensors.items(), {})
    _require_something(name, file)
    return file


def _require_sdxl_lora(header: WeightsHeader) -> None:
    foreign = foreign_adapter(header) if is_adapter(header) else kind_of(header)
    if foreign:
        raise ValueError(f"{header.path.name} is {foreign}: {WANTED}")


def _require_something(name: str, file: LoRAFile) -> None:
    if any(file.parts().values()) or file.tokens:
        return
    if kind := other_adapter(file.unknown):
        raise ValueError(
            f"{name} is {kind}, which this pack cannot apply: use a LoRA, LoHa or LoKr, or load it with "
            "ComfyUI's Load LoRA"
        )
    raise ValueError(f"{name} has no module that this pack can apply ({first_names(file.unknown)}): {WANTED}")


def write_lora(path: Path, file: LoRAFile, dtype: torch.dtype, format: FileFormat = "kohya") -> None:
    """Writes a LoRA atomically, equal bytes for equal content. Adds the hash by which model sites identify files.

    Raises ValueError, without writing, for values that are not finite in `dtype`.
    """
    tensors = state_dict(file, dtype, format)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{path.name} is not written: {first_names(bad)} would contain NaN or infinity as {dtype}; "
            "save in fp32 or bf16 if the range of fp16 is too small, else train again with a lower learning_rate"
        )
    packed = pack_weights(tensors)
    digest = hashlib.sha256(packed.data).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    write_weights(path, packed, {**file.metadata, **hashes})


def settings_file(path: Path) -> Path | None:
    """The file of an adapter's settings that peft writes beside the weights, if there is one."""
    beside = path.with_name("adapter_config.json")
    return beside if path.name == "adapter_model.safetensors" and beside.is_file() else None
