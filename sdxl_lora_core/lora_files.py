"""LoRA files in and out.

In memory a LoRA's modules are named by diffusers' path inside their part, whatever the file's spelling was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .base_parts import ENCODERS, Part
from .lora_dialects import Place, Role, bundled_key, bundled_token, peft_alpha, peft_settings, place_of, role_of
from .lora_merge import MergeReport, merge_into, merge_stack
from .lora_metadata import lora_metadata, tag_counts, trigger_words
from .lora_modules import LOHA_FACTORS, AdapterModule, LoHaModule, LoKrModule, LoRAModule
from .lora_names import sai_block_name
from .model_kinds import foreign_adapter, is_adapter, kind_of
from .new_tokens import Vectors
from .train_config import LoRAFormat
from .weights_file import first_names, pack_weights, read_header, write_weights

__all__ = [
    "AdapterModule", "LoHaModule", "LoKrModule", "LoRAFile", "LoRAModule", "MergeReport", "describe_lora",
    "kohya_state_dict", "lora_metadata", "merge_into", "merge_stack", "peft_state_dict", "read_lora", "tag_counts",
    "trigger_words", "write_lora",
]  # fmt: skip

WANTED = "give an SDXL LoRA (.safetensors)"
_KOHYA_PREFIXES: dict[Part, str] = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass
class LoRAFile:
    """What a file holds. `tokens` are new words with their vectors; `unknown` are keys that are nothing of SDXL's."""

    unet: dict[str, AdapterModule] = field(default_factory=dict)
    text_encoder: dict[str, AdapterModule] = field(default_factory=dict)
    text_encoder_2: dict[str, AdapterModule] = field(default_factory=dict)
    tokens: dict[str, Vectors] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def parts(self) -> dict[Part, dict[str, AdapterModule]]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}


def read_lora(path: Path) -> LoRAFile:
    """Reads every spelling that lora_dialects lists.

    Raises FileNotFoundError, or ValueError for what is no SDXL LoRA (naming what it is), for one without a single
    low-rank change, and for damaged ones.
    """
    header = read_header(path)
    foreign = foreign_adapter(header) if is_adapter(header) else kind_of(header)
    if foreign:
        raise ValueError(f"{path.name} is {foreign}: {WANTED}")
    settings = peft_settings(header.metadata) or _settings_beside(path)
    groups, tokens, unknown = _group(path)
    file = LoRAFile(tokens=_tokens(path.name, tokens), metadata=dict(header.metadata))
    for place, tensors in groups.items():
        if _is_whole(tensors):
            file.parts()[place.part][place.module] = _module(path.name, place, tensors, settings)
        else:
            unknown += [f"{place.part}.{place.module} ({role} alone)" for role in tensors]
    if not any(file.parts().values()) and not tokens:
        raise ValueError(f"{path.name} holds no low-rank change this pack can apply ({first_names(unknown)}): {WANTED}")
    file.unknown = tuple(sorted(unknown))
    return file


def kohya_state_dict(file: LoRAFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """Kohya's keys with SAI's block names; ComfyUI, A1111 and diffusers read them. alpha and dora_scale stay fp32.

    Raises ValueError for a DoRA told by magnitude: with_dora_scale brings it into this form.
    """
    tensors: dict[str, Tensor] = {}
    for part, modules in file.parts().items():
        for path, module in modules.items():
            name = sai_block_name(path) if part == "unet" else path
            key = _KOHYA_PREFIXES[part] + name.replace(".", "_")
            if isinstance(module, LoRAModule) and module.magnitude is not None:
                raise ValueError(f"{path} is a DoRA in peft's form, which kohya's keys cannot hold: save it as peft")
            for factor, tensor in module.factors.items():
                tensors[f"{key}.{factor}"] = _stored(tensor, dtype)
            tensors[f"{key}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
            if module.dora_scale is not None:
                tensors[f"{key}.dora_scale"] = _stored(module.dora_scale, torch.float32)
    return dict(sorted((tensors | _bundled(file)).items()))


def peft_state_dict(file: LoRAFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """diffusers' keys. They have no place for alpha, so the scale alpha / rank is multiplied into lora_B.

    Raises ValueError for a LoHa or LoKr, which have no form here, and for a DoRA told by dora_scale.
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
                raise ValueError(f"{path} is a DoRA in kohya's form, which peft cannot hold: save it as kohya")
            if module.magnitude is not None:
                lengths = module.magnitude.flatten()
                shape = (-1,) if module.down.dim() == 2 else (1, -1, 1, 1)
                tensors[f"{key}.lora_magnitude_vector"] = _stored(lengths.reshape(shape), torch.float32)
    return dict(sorted((tensors | _bundled(file)).items()))


def _bundled(file: LoRAFile) -> dict[str, Tensor]:
    return {
        bundled_key(name, part): _stored(rows, torch.float32)
        for name, vectors in file.tokens.items()
        for part, rows in vectors.items()
    }


def write_lora(path: Path, file: LoRAFile, dtype: torch.dtype, format: LoRAFormat = "kohya") -> None:
    """Atomic; equal content gives equal bytes. Adds the hash of the tensors' bytes that galleries know files by.

    Raises ValueError, and writes nothing, for values that are not finite in `dtype`.
    """
    tensors = kohya_state_dict(file, dtype) if format == "kohya" else peft_state_dict(file, dtype)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{path.name} is not written: {first_names(bad)} would hold NaN or infinity as {dtype}; "
            "save in fp32 or bf16 if fp16 is too narrow, else train anew with a lower learning_rate"
        )
    packed = pack_weights(tensors)
    digest = hashlib.sha256(packed.data).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    write_weights(path, packed, {**file.metadata, **hashes})


def describe_lora(path: Path) -> str:
    """Some lines for a person: modules, rank, alpha, trigger words, what it was trained on, what is not understood."""
    file = read_lora(path)
    lines = [path.name]
    for part, modules in file.parts().items():
        if modules:
            ranks = sorted({module.rank for module in modules.values() if module.rank})
            alphas = sorted({module.alpha for module in modules.values()})
            kinds = "/".join(sorted({_kind(module) for module in modules.values()}))
            lines.append(f"{part}: {kinds} of {len(modules)} modules, rank {_span(ranks)}, alpha {_span(alphas)}")
    for token, vectors in file.tokens.items():
        lines.append(f"new token {token}: {len(vectors['text_encoder'])} vectors")
    if words := trigger_words(file.metadata):
        lines.append(f"trigger words: {', '.join(words)}")
    if base := file.metadata.get("ss_sd_model_name"):
        lines.append(f"trained on {base} for {file.metadata.get('ss_steps', 'unknown')} steps")
    if file.unknown:
        lines.append(f"{len(file.unknown)} keys are not understood: {first_names(file.unknown)}")
    return "\n".join(lines)


def _group(path: Path) -> tuple[dict[Place, dict[Role, Tensor]], dict[str, dict[Part, Tensor]], list[str]]:
    """The tensors by module and role, those of new tokens by token and encoder, and the names of all others."""
    groups: dict[Place, dict[Role, Tensor]] = {}
    tokens: dict[str, dict[Part, Tensor]] = {}
    unknown: list[str] = []
    with safe_open(path, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118
            stem, role = role_of(key) or ("", None)
            place = place_of(stem)
            if token := bundled_token(key):
                tokens.setdefault(token.name, {})[token.part] = weights.get_tensor(key)
            elif role is None or place is None:
                unknown.append(key)
            else:
                groups.setdefault(place, {})[role] = weights.get_tensor(key)
    return groups, tokens, unknown


def _tokens(file: str, tokens: Mapping[str, dict[Part, Tensor]]) -> dict[str, Vectors]:
    for name, vectors in tokens.items():
        if set(vectors) != set(ENCODERS) or len({len(rows) for rows in vectors.values()}) > 1:
            raise ValueError(f"{file}: the new token {name} has no vectors for one of the text encoders: damaged file")
    return dict(tokens)


def _is_whole(roles: Mapping[Role, Tensor]) -> bool:
    """Whether every factor of a LoRA, a LoHa or a LoKr is there."""

    def has(*names: str) -> bool:
        return all(name in roles for name in names)

    lokr = all(has(f"lokr_w{i}") or has(f"lokr_w{i}_a", f"lokr_w{i}_b") for i in (1, 2))
    return has("down", "up") or has(*LOHA_FACTORS) or lokr


def _module(file: str, place: Place, tensors: Mapping[Role, Tensor], settings: Mapping[str, Any]) -> AdapterModule:
    where = f"{file}: {place.part}.{place.module}"
    if not all(tensor.float().isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{where} holds NaN or infinity: its training broke down, take an earlier checkpoint")
    if "down" in tensors:
        return _lora_module(where, place, tensors, settings)
    factors = {role: tensor for role, tensor in tensors.items() if role.startswith(("hada_", "lokr_"))}
    module = (LoHaModule if "hada_w1_a" in factors else LoKrModule)(factors, 1.0, tensors.get("dora_scale"))
    try:
        module.change(torch.device("meta"))
    except RuntimeError as error:
        raise ValueError(f"{where} has factors that do not fit together ({error}): damaged file") from error
    return replace(module, alpha=float(tensors["alpha"]) if "alpha" in tensors else float(module.rank or 1))


def _lora_module(where: str, place: Place, tensors: Mapping[Role, Tensor], settings: Mapping[str, Any]) -> LoRAModule:
    down, up = tensors["down"], tensors["up"]
    if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
        raise ValueError(f"{where} has factors {list(down.shape)} and {list(up.shape)} of unlike rank: damaged file")
    if "mid" in tensors:  # a convolution factored once more: [rank, in] pixelwise, then [rank, rank, h, w]
        down = torch.einsum("okhw,ki->oihw", tensors["mid"].float(), down.flatten(1).float())
    if down.dim() == 4 and down.shape[2:] == (1, 1) and not place.module.endswith("conv_shortcut"):
        down, up = down.flatten(1), up.flatten(1)  # some write linear layers as 1x1 convolutions
    rank = down.shape[0]
    alpha = float(tensors["alpha"]) if "alpha" in tensors else peft_alpha(settings, place, rank)
    magnitude = tensors.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude.reshape(-1, *[1] * (down.dim() - 1))
    return LoRAModule(down, up, alpha, tensors.get("dora_scale"), magnitude)


def _settings_beside(path: Path) -> dict[str, Any]:
    """peft keeps an adapter's settings in a file beside the weights."""
    beside = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not beside.is_file():
        return {}
    return json.loads(beside.read_text(encoding="utf-8"))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _kind(module: AdapterModule) -> str:
    return "DoRA" if isinstance(module, LoRAModule) and module.is_dora else module.kind


def _span(values: Sequence[float]) -> str:
    if not values:
        return "full"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
